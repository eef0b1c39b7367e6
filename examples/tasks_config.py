"""The task list: `autoflow-worker dev --tasks examples.tasks_config:tasks`."""

from examples.emails import send_digest_task, send_welcome_email_task
from examples.files import checksum_file_task
from examples.payments import charge_card_task, refund_task
from examples.readings import store_readings_task
from examples.reports import build_report_task
from examples.tickets import triage_ticket_task
from examples.webhooks import deliver_webhook_task

tasks = [
    send_welcome_email_task,
    send_digest_task,
    build_report_task,
    checksum_file_task,
    charge_card_task,
    refund_task,
    deliver_webhook_task,
    store_readings_task,
    triage_ticket_task,
]
