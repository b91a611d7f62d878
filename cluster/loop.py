"""`curlora schedule`: runs ticks by a cron expression, one at a time, each in its own process.

With separate processes, a loop that lives for months accumulates nothing, and a tick that crashes does not end it.
While a job is running, ticks follow every `follow_up` seconds, so that the next domain need not wait for the next cron
time.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta

from cluster.decisions import schedule_folder
from pipelines.config.domains import DomainsConfig
from pipelines.config.pipeline import PipelineConfig
from pipelines.errors import ConfigError, Problem

SKIP_SECONDS = 60  # by which a tick may be late under `catch_up: skip`


def cron_trigger(domains: DomainsConfig):
    """The trigger of `domains.cron`.

    Raises:
        ConfigError: `cron` or `timezone` is invalid.
    """
    from apscheduler.triggers.cron import CronTrigger  # slow

    try:
        return CronTrigger.from_crontab(domains.cron, timezone=domains.timezone)
    except (ValueError, KeyError, OSError) as error:
        message = (
            f"'{domains.cron}' in '{domains.timezone}' is not a schedule ({error}); write e.g. cron: \"0 3 * * *\""
        )
        raise ConfigError([Problem("domains.cron", message)]) from error


def next_times(config: PipelineConfig, count: int = 3) -> list[datetime]:
    """The next times at which the loop would look."""
    trigger, found, moment = cron_trigger(config.domains), [], None
    for _ in range(count):
        moment = trigger.get_next_fire_time(moment, moment or datetime.now(trigger.timezone))
        found.append(moment)
        moment += timedelta(seconds=1)
    return found


class Loop:
    """Runs ticks until interrupted.

    Args:
        arguments: arguments of `curlora tick`.
        say: called with each line of output.
    """

    def __init__(self, config: PipelineConfig, arguments: Sequence[str], say: Callable[[str], None]):
        from apscheduler.executors.pool import ThreadPoolExecutor  # slow
        from apscheduler.schedulers.blocking import BlockingScheduler

        self.config, self.arguments, self.say = config, list(arguments), say
        # one thread: ticks by cron and ticks that follow a job wait for each other
        self.scheduler = BlockingScheduler(
            executors={"default": ThreadPoolExecutor(1)}, timezone=config.domains.timezone
        )
        self.trigger = cron_trigger(config.domains)

    def run(self) -> None:
        """Run the loop; blocks. Ctrl-C ends the loop, not the jobs."""
        once = self.config.domains.catch_up == "once"
        self.scheduler.add_job(
            self.look,
            self.trigger,
            id="cron",
            coalesce=True,
            max_instances=1,
            misfire_grace_time=None if once else SKIP_SECONDS,
        )
        if self.is_due():
            self._soon(0)
        self.say(f"next look at {next_times(self.config, 1)[0]:%Y-%m-%d %H:%M:%S %Z}; Ctrl-C ends the loop")
        self.scheduler.start()

    def is_due(self) -> bool:
        """Whether a tick is due now: a job was running at the last tick, or a cron time to be caught up was missed."""
        last = schedule_folder(self.config).read_json("last_tick.json")
        if last and last["at_work"]:
            return True
        if self.config.domains.catch_up == "skip":
            return False
        zone = self.trigger.timezone
        moment = datetime.fromtimestamp(last["time"], zone) if last else None
        return moment is None or self.trigger.get_next_fire_time(None, moment) <= datetime.now(zone)

    def look(self) -> None:
        """Run one tick in a separate process."""
        command = [sys.executable, "-m", "pipelines", "tick", *self.arguments, "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:  # the tick has printed the reason; the next one may succeed
            self.say(f"tick ended with exit code {done.returncode}")
            return
        outcome = json.loads(done.stdout)
        for line in outcome["did"]:
            self.say(f"{datetime.now():%H:%M:%S} {line}")
        if outcome["at_work"]:
            self._soon(self.config.domains.follow_up)

    def _soon(self, seconds: float) -> None:
        moment = datetime.now(self.trigger.timezone) + timedelta(seconds=seconds)
        self.scheduler.add_job(
            self.look, "date", run_date=moment, id="follow-up", replace_existing=True, misfire_grace_time=None
        )
