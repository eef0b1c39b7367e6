"""The tests of a task stand beside it; `make test` runs them."""

from autoflow_worker.testing import RecordingScheduler, run_task
from examples.emails import WelcomeEmail, send_digest_task, send_welcome_email_task


async def test_a_welcome_email_is_sent() -> None:
    ann = WelcomeEmail(email="ann@example.com", name="Ann")
    run = await run_task(send_welcome_email_task, ann)
    assert run.outcome == "completed"
    assert run.output == {"sent": True, "subject": "Welcome, Ann"}


async def test_an_address_that_is_none_fails_for_good() -> None:
    run = await run_task(send_welcome_email_task, {"email": "nobody", "name": "Ann"})
    assert run.outcome == "failed"
    assert run.error is not None
    assert "email" in run.error


async def test_a_digest_is_scheduled_and_sent() -> None:
    scheduler = RecordingScheduler()
    digest = {"email": "ann@example.com", "articles": ["one", "two"]}
    await scheduler.schedule(send_digest_task, digest, delay_ms=3_600_000)
    assert scheduler.assert_scheduled(send_digest_task, email="ann@example.com").delay_ms > 0
    [run] = await scheduler.drain()
    assert run.output == {"sent": True, "articles": 2}
