"""Settings of the property tests: no deadlines."""

from hypothesis import HealthCheck, settings

# A slow machine is no fault of the code.
settings.register_profile(
    "any-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)
settings.load_profile("any-machine")
