"""Two usual tasks: the payload is a pydantic model, the result a plain object."""

import asyncio

from pydantic import BaseModel, Field

from autoflow_worker import TaskContext, TaskOptions, define_task


class WelcomeEmail(BaseModel):
    email: str = Field(pattern=r"^[^@\s]+@[^@\s]+$")
    name: str


async def send_welcome_email(payload: WelcomeEmail, ctx: TaskContext) -> dict[str, object]:
    ctx.logger.info("sending_welcome_email", email=payload.email)
    await asyncio.sleep(0.02)  # the mail server
    return {"sent": True, "subject": f"Welcome, {payload.name}"}


# A job mostly waits for the mail server, so ten of them run at once.
send_welcome_email_task = define_task(
    queue_name="users-send-welcome-email",
    handler=send_welcome_email,
    options=TaskOptions(priority="high", concurrency=10),
)


class Digest(BaseModel):
    email: str
    articles: list[str]


async def send_digest(payload: Digest, ctx: TaskContext) -> dict[str, object]:
    await asyncio.sleep(0.02)
    return {"sent": True, "articles": len(payload.articles)}


# Usually scheduled with a delay. The mail provider allows 50 of these per second.
send_digest_task = define_task(
    queue_name="users-send-digest",
    handler=send_digest,
    options=TaskOptions(priority="low", concurrency=10),
    worker_options={"limiter": {"max": 50, "duration": 1000}},
)
