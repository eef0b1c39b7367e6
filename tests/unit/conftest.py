"""How the property tests run: without looking at the clock."""

from hypothesis import HealthCheck, settings

# A machine may be slow, and then nothing is wrong with the code.
settings.register_profile(
    "any-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)
settings.load_profile("any-machine")
