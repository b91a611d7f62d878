"""One tick of the schedule: trains a new domain from the inbox, starting from the champion's adapter.

A tick follows the running job, then looks for a complete and valid domain that was not decided on before and that the
champion has not learned. It copies the domain's data into the storage, submits a chain that continues from the
champion as a job, records its decision with the reasons, and ends. All files are below `<storage>/<name>.domains/`:

    decisions/<time>.<domain>.<stamp>.<state>.<id>.json   accepted, submitted, finished, refused, unchanged or failed;
                                                          `again` withdraws the earlier ones of a domain
    data/<domain>-<stamp>/                                the checked copy that is trained
    drift/, recent/                                       the champion on recent text (drift.py)
    notify/, undelivered/                                 messages to the outside (notices.py)
    pause.json, last_tick.json, lease.json

File names alone tell what is decided: a tick without news reads no content and imports nothing slow.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cluster.decisions import NAME_LENGTH, Decision, Ledger, schedule_folder
from cluster.drift import RECENT, measure
from cluster.inbox import Domain, copy_domain, scan
from cluster.notices import deliver, take_over, tell_decision
from pipelines.chain.start import find_start
from pipelines.config.domains import DomainsConfig
from pipelines.config.loading import parse_config
from pipelines.config.pipeline import PipelineConfig
from pipelines.data.held_out import training_digests
from pipelines.errors import ConfigError, DataError, LeaseHeld, LineageError, Problem, Unavailable
from pipelines.lineage import registry
from pipelines.preflight.hub import hub_available
from pipelines.preflight.portability import open_secrets, unshared
from pipelines.preflight.tools import notify_problems
from pipelines.runs.directory import RunDirectory
from pipelines.runs.lease import acquire_lease
from pipelines.runs.results import Results
from pipelines.runs.verdict import Verdict


@dataclass
class Outcome:
    """What a tick did, in sentences; `at_work`: a job is running, so the next tick should follow soon."""

    did: list[str] = field(default_factory=list)
    at_work: bool = False

    def to_json(self) -> dict:
        return {"did": self.did, "at_work": self.at_work}


def check_schedule(config: PipelineConfig) -> None:
    """Raise ConfigError if domains cannot be scheduled with this configuration."""
    problems = []
    if config.domains is None:
        problems.append(Problem("domains", "is null; name an inbox, e.g. domains: {inbox: s3://…, template: {…}}"))
    if config.tracking is None or config.tracking.register_as is None:
        why = "the champion that a new domain continues from is a version of it"
        problems.append(Problem("tracking.register_as", f"is null; name a model: {why}"))
    if config.gate is None:
        problems.append(Problem("gate", "is null, so no candidate could become champion; set its limits"))
    problems += notify_problems(config)
    if problems:
        raise ConfigError(problems)


def tick(config: PipelineConfig, cluster: Callable, dry_run: bool = False) -> Outcome:
    """Look at the inbox once. Safe to call at any rate and from several machines at the same time.

    Args:
        cluster: returns the `cluster.jobs.Cluster`; called only if jobs are to be queried or submitted.
        dry_run: only report what would be done.

    Raises:
        ConfigError: the configuration itself is at fault, not a domain.
        Unavailable: cluster or registry cannot be reached; call again later.
    """
    folder = schedule_folder(config)
    if folder.exists("pause.json"):
        return Outcome(["paused; resume with --resume"])
    drifted = _drift(config, folder) if config.domains.drift and not dry_run else []
    outcome = _look(config, folder, cluster, dry_run)
    outcome.did[:0] = drifted
    return outcome


def _drift(config: PipelineConfig, folder: RunDirectory) -> list[str]:
    """Measure the champion's drift, unless another tick is at work."""
    try:
        with acquire_lease(folder):
            return measure(config, folder, champion_of(config))
    except LeaseHeld:
        return []


def _domains(config: PipelineConfig, folder: RunDirectory) -> list[Domain]:
    """What the inbox holds, and the recent text that is to be trained.

    Raises:
        ConfigError: the inbox cannot be listed, or a domain has the name that recent text is trained under.
    """
    domains = config.domains
    try:
        found = scan(domains.inbox, domains.marker)
    except OSError as error:
        raise ConfigError([Problem("domains.inbox", f"'{domains.inbox}' cannot be listed ({error})")]) from error
    if domains.drift is None or not domains.drift.retrain:
        return found
    if any(domain.name == domains.drift.domain for domain in found):
        message = f"'{domains.drift.domain}' is a domain of the inbox, too; choose another name"
        raise ConfigError([Problem("domains.drift.domain", message)])
    return [*found, *(scan(f"{folder.uri}/{RECENT}", domains.marker) if folder.exists(RECENT) else [])]


def _look(config: PipelineConfig, folder: RunDirectory, cluster: Callable, dry_run: bool) -> Outcome:
    found = _domains(config, folder)
    ledger = Ledger(folder)
    fresh = [domain for domain in found if not ledger.of(domain.key, domain.stamp)]
    if dry_run:
        return _forecast(config.domains, ledger, fresh) if fresh or ledger.open() else _nothing_new(found)
    if not fresh and not ledger.open():
        outcome = _nothing_new(found)
        outcome.did += deliver(folder, config)
        return _recorded(folder, outcome)
    try:
        with acquire_lease(folder):
            ledger.read()  # another tick may have decided meanwhile
            fresh = [domain for domain in found if not ledger.of(domain.key, domain.stamp)]
            outcome = _Tick(config, ledger, cluster).at(fresh)
            outcome.did += deliver(folder, config)
            return _recorded(folder, outcome)
    except LeaseHeld:
        return Outcome(["another tick is at work"], at_work=True)


def _nothing_new(found: Sequence[Domain]) -> Outcome:
    return Outcome([f"nothing new among {len(found)} domains"])


def _recorded(folder: RunDirectory, outcome: Outcome) -> Outcome:
    folder.write_json("last_tick.json", outcome.to_json() | {"time": time.time()})
    return outcome


def _forecast(domains: DomainsConfig, ledger: Ledger, fresh: Sequence[Domain]) -> Outcome:
    outcome = Outcome([f"{decision.domain}: its job would be looked at" for decision in ledger.open()])
    for domain in fresh:
        if domain.problems:
            what = f"would be refused: {domain.problems[0]}"
        elif not domain.is_complete(domains.quiet_period, time.time()):
            what = "is not complete yet"
        else:
            what = "is complete; it would be checked, and trained when its turn comes"
        outcome.did.append(f"{domain.key}: {what}")
    return outcome


def champion_of(config: PipelineConfig) -> registry.Version | None:
    """The champion of the schedule's model.

    Raises:
        Unavailable: the registry cannot be reached.
    """
    try:
        return registry.champion(config.tracking.uri, config.tracking.register_as)
    except LineageError as error:
        raise Unavailable(str(error)) from error


class _Tick:
    """The part of a tick that has effects; runs under the lease of the schedule."""

    def __init__(self, config: PipelineConfig, ledger: Ledger, cluster: Callable):
        self.config, self.domains, self.ledger = config, config.domains, ledger
        self._connect, self._cluster = cluster, None
        self.outcome = Outcome()

    @property
    def cluster(self):
        if self._cluster is None:
            self._cluster = self._connect()
        return self._cluster

    def at(self, fresh: Sequence[Domain]) -> Outcome:
        for decision in self.ledger.open():
            self._follow(decision)
        for domain in fresh:
            if domain.problems:
                self._settle(domain.key, domain.stamp, "refused", reasons=domain.problems)
            elif not domain.is_complete(self.domains.quiet_period, time.time()):
                self._say(domain.key, "is not complete yet")
            elif self.outcome.at_work:
                self._say(domain.key, "waits for the job that is at work")
            else:
                self._take(domain)
        return self.outcome

    def _say(self, domain: str, text: str) -> None:
        self.outcome.did.append(f"{domain}: {text}")

    def _settle(self, domain: str, stamp: str, state: str, **fields) -> None:
        round_number = self.ledger.rounds(domain, stamp)
        tell_decision(self.ledger.folder, self.config, domain, [stamp, round_number], state, **fields)
        self.ledger.record(domain, stamp, state, **fields)
        self._say(domain, f"{state}: {'; '.join(fields['reasons'])}")

    # -- a new domain

    def _take(self, domain: Domain) -> None:
        """Copy, check and submit a complete domain, or record why not."""
        label = f"{domain.key}-{domain.stamp[:8]}"
        data = copy_domain(domain.inbox, domain, self.domains.marker, self.ledger.folder, f"data/{label}")
        if data is None:
            self._say(domain.key, "is still being written")
            return
        champion = champion_of(self.config)
        chain = self._chain(domain, data, champion)
        state, reasons = self._check(domain, chain, champion)
        if reasons:
            self.ledger.folder.remove(f"data/{label}")
            inbox = f"{domain.inbox.rstrip('/')}/{domain.name}"  # where its owner can correct it
            reasons = [reason.replace(data, inbox) for reason in reasons]
            self._settle(domain.key, domain.stamp, state, reasons=reasons)
            return
        self._check_chain(chain)
        parent = chain.start_from or "the base"
        run = {"run": chain.name, "run_uri": chain.run_uri, "start_from": chain.start_from}
        self.ledger.record(domain.key, domain.stamp, "accepted", **run, config=chain.model_dump())
        self._say(domain.key, f"accepted; the chain continues from {parent}")
        self._submit(domain.key, domain.stamp, chain)

    def _chain(self, domain: Domain, data: str, champion) -> PipelineConfig:
        """The chain to train: the champion's tasks as they were trained, then the new one.

        Raises:
            ConfigError: the champion's run is gone, or its tasks do not fit this configuration.
        """
        raw = self.config.model_dump() | {"domains": None, "name": self._run_name(domain)}
        tasks = list(raw["tasks"])
        if champion is not None:
            run = RunDirectory(champion.run_uri)
            if not run.exists("config.yaml"):
                message = f"version {champion.version} is the champion, but its run {champion.run_uri} is gone"
                raise ConfigError([Problem("tracking.register_as", f"{message}; promote another version")])
            learned = [task.model_dump() for task in run.config().tasks]
            names = {task["name"] for task in learned}
            tasks = [*learned, *(task for task in tasks if task["name"] not in names)]
            raw["start_from"] = f"{champion.run_uri}/{champion.step_directory}"
        tasks = [task for task in tasks if task["name"] != domain.name]
        own = {**self.domains.template, "name": domain.name, "data": data}
        return parse_config(raw | {"tasks": [*tasks, own]})

    def _run_name(self, domain: Domain) -> str:
        ending = f"-{domain.name[:40]}-{domain.stamp[:8]}"
        return self.config.name[: NAME_LENGTH - len(ending)] + ending

    def _check(self, domain: Domain, chain: PipelineConfig, champion) -> tuple[str, list[str]]:
        """(state, reasons) why this domain is not trained; it is trained if there are no reasons."""
        from pipelines.preflight.data import check_data  # imports numpy; a tick without news needs none

        hub_available(chain)
        taken = {"base", *(source.name for source in [*self.config.tasks, *self.config.retention])}
        if domain.name in taken:
            return "refused", [f"the name '{domain.name}' is taken in the configuration; rename the folder"]
        alone = chain.model_copy(update={"tasks": [chain.tasks[-1]], "retention": []})
        problems = check_data(alone)
        if problems:
            return "refused", [problem.message for problem in problems]
        try:
            known = champion is not None and champion.digests.get(domain.name) in training_digests(chain.tasks[-1])
        except DataError as error:
            return "refused", [str(problem) for problem in error.problems]
        return "unchanged", [f"version {champion.version} has learned these very rows"] if known else []

    def _check_chain(self, chain: PipelineConfig) -> None:
        """Raise ConfigError if the schedule's own configuration is at fault rather than the domain."""
        one_machine = self.domains.shared_paths or self.cluster.is_this_machine()
        problems = [*unshared(chain, one_machine), *open_secrets(chain)]
        if problems:
            raise ConfigError(problems)
        find_start(chain)

    # -- a job

    def _submit(self, domain: str, stamp: str, chain: PipelineConfig) -> None:
        job, _ = self.cluster.submit(chain)
        self.ledger.record(domain, stamp, "submitted", job=job.id, run=chain.name)
        self._say(domain, f"is trained by job {job.id}")
        self.outcome.at_work = True

    def _follow(self, accepted: Decision) -> None:
        """Follow an accepted domain; a failed job is submitted again up to `max_attempts` times."""
        chain = PipelineConfig.model_validate(self.ledger.body(accepted)["config"])
        submitted = [d for d in self.ledger.of(accepted.domain, accepted.stamp) if d.state == "submitted"]
        job = self.cluster.job(self.ledger.body(submitted[-1])["job"]) if submitted else None
        results = RunDirectory(chain.run_uri).results()
        if job is not None and not job.over:
            self._say(accepted.domain, f"job {job.id} is at work")
            self.outcome.at_work = True
        elif results and results.is_finished and (job is None or job.status == "SUCCEEDED"):
            self._finish(accepted, chain, results)
        elif len(submitted) < self.domains.max_attempts:
            self._submit(accepted.domain, accepted.stamp, chain)
        else:
            last = (job.message.strip().splitlines() or ["no message"])[-1] if job else "the cluster forgot the job"
            remedy = f"correct the cause, then: curlora tick … --again {accepted.domain}"
            reason = f"{len(submitted)} jobs failed ({last}); {remedy}"
            take_over(self.ledger.folder, self.config, chain.run_uri)
            self._settle(accepted.domain, accepted.stamp, "failed", run=chain.name, reasons=[reason])

    def _finish(self, accepted: Decision, chain: PipelineConfig, results: Results) -> None:
        gate, registry = results.gate or {}, results.registry or {}
        verdict = Verdict.of(gate)
        take_over(self.ledger.folder, self.config, chain.run_uri)
        fields = {"verdict": verdict.value, "reasons": gate.get("reasons", []), "version": registry.get("uri")}
        fields |= {"run": chain.name, "run_uri": chain.run_uri, "promoted": registry.get("promoted", False)}
        self.ledger.record(accepted.domain, accepted.stamp, "finished", **fields)
        state = "is champion now" if fields["promoted"] else "stays a candidate"
        why = f" ({'; '.join(fields['reasons'])})" if fields["reasons"] else ""
        self._say(accepted.domain, f"finished; the gate: {verdict}{why}; {fields['version'] or chain.name} {state}")
