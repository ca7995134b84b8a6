"""``medray federate site``: a hospital takes part, by its own rules.

Whatever arrives passes the guard: what is asked is written to the audit log, held against ``site.yaml``, done by the
code that is installed here, and what leaves is written down before it does.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from medray.config.federation_files import SiteConfig, read_site
from medray.config.schema import Experiment
from medray.data.checks import check, require_sound
from medray.data.layouts import build_manifest
from medray.data.manifest import Manifest
from medray.engines.flower.parcel import Kind, Parcel
from medray.errors import (
    FederationError,
    NonFiniteLossError,
    OutOfMemoryError,
    PolicyError,
    PrivacyError,
    WithheldError,
)
from medray.privacy.accountant import PrivacyPlan
from medray.privacy.audit import Audit
from medray.privacy.policy import Request, decide, decide_fingerprint, decide_moment, decide_survey, recipe_digest
from medray.privacy.rules import check_private
from medray.privacy.secagg.identity import Signer
from medray.tasks.catalogue import find_task
from medray.workflows.federation.charging import Charges, open_ledger
from medray.workflows.federation.keeping import place_of, run_folder
from medray.workflows.federation.sealing import STAGES
from medray.workflows.federation.site import SiteFolder, SiteWorker
from medray.workflows.federation.surveying import SCHEMA, SUMS, SURVEYED

__all__ = ["Guard", "attend_federation", "harmonised"]

Told = Callable[[str], None]
RETRY_SECONDS = 15.0
CURES: dict[type[Exception], str] = {
    NonFiniteLossError: ". Training diverged: lower optim.lr, or raise schedule.warmup",
    OutOfMemoryError: ". Memory was short: lower train.batch_size, or set train.micro_batch",
}
"""What the server may hear of an error beside its name."""
SAID_UNDER_PRIVACY = frozenset({"name", "keys"})
"""What may stand beside protected weights: counts, losses and metrics of patients' data are no less private."""


def attend_federation(
    path: Path,
    *,
    check_only: bool = False,
    told: Told = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
    poll: float | None = None,
) -> None:
    """Take part until stopped.

    Args:
        path: ``site.yaml``.
        check_only: read the rules, look at the data, shake hands with the server, and send nothing.
        told: hears a line of each thing that a person should know.
        stop: asked between messages.
        poll: seconds between questions for work; None for the default.

    Raises:
        ConfigError: ``site.yaml`` is refused.
        DataError: the data can't be trained on.
        FederationError: the server refuses this site's key, or can't be trusted; another process is this site.
    """
    rules = read_site(path)
    os.umask(0o077)  # prepared images, ledger and checkpoints are nobody else's
    with _alone(rules.work):
        _attend(rules, check_only, told, stop, poll)


@contextlib.contextmanager
def _alone(work: Path) -> Iterator[None]:
    """One process a site: two would count the same steps of a run."""
    work.mkdir(parents=True, exist_ok=True)
    handle = os.open(work / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FederationError(f"{work}: another process of this site is at work. Stop that one first") from None
        yield
    finally:
        os.close(handle)


def _attend(rules: SiteConfig, check_only: bool, told: Told, stop: Callable[[], bool], poll: float | None) -> None:
    from medray.engines.flower.line import POLL_SECONDS, Line, attend, check_server
    from medray.engines.flower.site import client_app

    folder = SiteFolder(name=rules.name, directory=str(rules.work / "site"), cache=str(rules.work / "cache"))
    manifest = _prepare(rules, Path(folder.directory), told)
    if rules.privacy.require_secure_aggregation:
        _signer(rules)  # else every round would fail for want of it
    host, _, port = rules.server.rpartition(":")
    line = Line(host=host.strip("[]"), port=int(port), ca=rules.ca, key=rules.key)
    until = _reach(lambda: check_server(line), wait=not check_only, told=told, stop=stop)
    if until is None:
        return
    told(f"server {rules.server}: its certificate is this federation's, valid until {until:%Y-%m-%d}")
    if check_only:
        told("ready: nothing was sent. Take part with: medray federate site site.yaml")
        return
    _limit(rules)
    guard = Guard(rules, manifest, folder)
    attend(line, client_app(lambda _: guard), stop=stop, told=told, poll=poll or POLL_SECONDS)


class Guard:
    """Between the line and the site's worker; see :data:`medray.engines.flower.parcel.Answer`."""

    def __init__(self, rules: SiteConfig, manifest: Manifest, folder: SiteFolder) -> None:
        self.rules, self.audit, self.task = rules, Audit(rules.audit), manifest.task
        self.patients = len({case.group for case in manifest.cases})
        self.ledger = open_ledger(rules)
        self._charges, self._run = Charges(self.ledger, rules.work / "charged.json"), ""
        self.worker = SiteWorker(
            folder,
            charge=self._charge,
            fewest=rules.fewest,
            signer=partial(_signer, rules),
            note=lambda text: self.audit.write("noted", reason=text[:2000]),
            models=rules.work / "models",
        )
        self.audit.write("started", site=rules.name, federation=rules.federation, patients=self.patients)

    def __call__(self, kind: Kind, parcel: Parcel) -> Parcel:
        """Answer, if the rules allow it.

        Raises:
            PolicyError: they don't.
            PrivacyError: it would not be private, or over the ledger's budget; or the audit log can't be written.
        """
        what = str(parcel.text.get("ask", kind))[:100]
        about: dict[str, Any] = {"kind": kind, "what": what, "round": _round(parcel)}
        try:
            self._decide(kind, what, parcel, about)
        except (FederationError, PrivacyError) as error:
            self.audit.write("refused", **about, reason=_exactly(error)[:2000])
            raise
        self.audit.write("asked", **about)
        try:
            answer = self._protected(kind, self.worker(kind, parcel))
        except (PolicyError, PrivacyError) as error:
            self.audit.write("refused", **about, reason=_exactly(error)[:2000])
            raise
        except FederationError as error:  # these say nothing of cases
            self.audit.write("failed", **about, reason=str(error)[:2000])
            raise
        except Exception as error:
            # What any other error says may name a file or a patient, or hold a figure of one: it stays here.
            self.audit.write("failed", **about, reason=f"{type(error).__name__}: {error}"[:2000])
            cure = next((text for kind_, text in CURES.items() if isinstance(error, kind_)), "")
            raise FederationError(
                f"site {self.rules.name}: {type(error).__name__} while it worked; its own audit log says more{cure}"
            ) from None
        self.audit.write("released", **about, bytes=_bytes(answer), sha256=_digest(answer))
        return answer

    def _decide(self, kind: Kind, what: str, parcel: Parcel, about: dict[str, Any]) -> None:
        if kind == "query" and what == "hello":
            return
        if kind == "query" and what == SCHEMA:
            decide_moment(self.rules, now=dt.datetime.now(), patients=self.patients)
            return
        if kind == "query" and what == "fingerprint":
            decide_fingerprint(self.rules, now=dt.datetime.now(), patients=self.patients)
            return
        try:
            experiment = Experiment.model_validate(parcel.text.get("experiment"))
        except ValidationError as error:
            raise PolicyError(
                f"site {self.rules.name!r} refuses: no valid experiment came with the request "
                f"({error.error_count()} faults). Do both sides run the same version?"
            ) from None
        request = _request(experiment)
        about |= {"recipe": request.recipe, "model": request.model[:100], "strategy": request.strategy}
        self._run = f"{request.recipe}/{place_of(parcel)[0]}"
        if experiment.privacy.on:
            self._charges.give_back(but=self._run)
        # Of what this very run reserved, the ledger itself knows; a run that goes on isn't refused for its own past.
        # Nor is one that asks for a last look, which spends nothing.
        past = kind == "evaluate" or self._charges.running(self._run)
        spent = 0.0 if past else self.ledger.spent(this_year=True).epsilon
        if experiment.privacy.on and not experiment.privacy.secure:
            raise PolicyError(
                f"site {self.rules.name!r} refuses: privacy.secure=false draws noise that can be foretold. Leave it out"
            )
        if kind == "query" and (what == SUMS or self._is_survey(what, request.recipe, parcel)):
            decide_survey(self.rules, request, now=dt.datetime.now(), spent=spent, patients=self.patients)
            return
        decide(self.rules, request, now=dt.datetime.now(), spent=spent, patients=self.patients)
        check_private(experiment, kind=self.task)
        if experiment.model.pretrained is not None:
            raise PolicyError(
                f"site {self.rules.name!r} refuses: model.pretrained names a file here, or makes this machine call "
                "out. Begin from random weights"
            )

    def _is_survey(self, what: str, recipe: str, parcel: Parcel) -> bool:
        """Whether a question of secure aggregation is of sums that this site has told of, and not of an update."""
        folder = run_folder(self.rules.work / "site", recipe, place_of(parcel)[0])
        return what in STAGES and (folder / SURVEYED).is_file()

    def _charge(self, plan: PrivacyPlan, steps: int) -> None:
        """Before each round of private training."""
        least = self.rules.privacy.least_noise
        if plan.noise_multiplier < least:
            rule = f"less than privacy.least_noise={least:g}. Ask for smaller batches, or a smaller privacy.epsilon"
            raise WithheldError(
                f"site {self.rules.name!r} refuses: the noise multiplier would be {rule}",
                f"noise multiplier {plan.noise_multiplier:.3g} is {rule}",
            )
        try:
            self._charges(self._run, plan, steps)
        except PrivacyError as error:  # what a run costs depends on how many patients there are
            raise WithheldError(
                f"site {self.rules.name!r} refuses: this would cost more of the privacy budget than the site's ledger "
                "has left for it. Lower privacy.epsilon; the site's own audit log says more",
                str(error),
            ) from None

    def _protected(self, kind: Kind, answer: Parcel) -> Parcel:
        """The answer without what no mechanism has protected, where the site demands protection."""
        if not self.rules.privacy.required or kind == "query":
            return answer
        text = {name: value for name, value in answer.text.items() if name in SAID_UNDER_PRIVACY}
        return Parcel(text=text, arrays=answer.arrays, error=answer.error)


def harmonised(manifest: Manifest, rules: SiteConfig) -> Manifest:
    """The manifest in the federation's words: classes renamed and put in its order.

    Raises:
        FederationError: a class that the federation doesn't have, or masks whose order can't be changed by names.
    """
    renamed = tuple(rules.labels.get(name, name) for name in manifest.classes)
    unused = sorted(set(rules.labels) - set(manifest.classes))
    if unused:
        raise FederationError(
            f"labels: {unused[0]!r} is no class of these data; they have {', '.join(manifest.classes)}"
        )
    wanted = rules.classes or renamed
    strange = [name for name in renamed if name not in wanted]
    if strange:
        raise FederationError(
            f"class {strange[0]!r} of these data is none of the federation's ({', '.join(wanted)}). Say which it is, "
            f"in site.yaml: labels: {{{strange[0]}: {wanted[0]}}}"
        )
    if renamed == wanted:
        return manifest.model_copy(update={"classes": wanted})
    if find_task(manifest.task).target != "class":
        raise FederationError(
            f"classes {', '.join(renamed)} stand in another order than the federation's ({', '.join(wanted)}): the "
            "numbers in masks, or columns of labels, mean something else. Write them anew in that order"
        )
    place = [wanted.index(name) for name in renamed]
    cases = tuple(
        case.model_copy(update={"label": place[case.label]}) if isinstance(case.label, int) else case
        for case in manifest.cases
    )
    return manifest.model_copy(update={"classes": wanted, "cases": cases})


def _prepare(rules: SiteConfig, directory: Path, told: Told) -> Manifest:
    told(f"looking at {rules.data}")
    manifest = check(build_manifest(rules.data))
    require_sound(manifest)
    manifest = harmonised(manifest, rules)
    for finding in manifest.findings[:5]:
        told(f"{finding.severity}: {finding.message}. {finding.fix}")
    manifest.save(directory / "manifest.json")
    patients = len({case.group for case in manifest.cases})
    told(f"{len(manifest.cases)} cases of {patients} patients: {manifest.task}, {', '.join(manifest.classes)}")
    return manifest


def _reach(knock: Callable[[], dt.datetime], *, wait: bool, told: Told, stop: Callable[[], bool]) -> dt.datetime | None:
    """Until when the server's certificate is valid; waits for one that is away. None: stopped meanwhile."""
    said = ""
    while not stop():
        try:
            return knock()
        except FederationError as error:
            if not wait or "can't be reached" not in str(error):
                raise
            if str(error) != said:
                said = str(error)
                told(f"{said} Trying again every {RETRY_SECONDS:.0f} s")
        time.sleep(RETRY_SECONDS)
    return None


def _limit(rules: SiteConfig) -> None:
    """Keep to the processors and the memory that ``site.yaml`` grants."""
    import resource

    import torch

    if rules.cpus is not None:
        torch.set_num_threads(rules.cpus)
    if rules.memory_gb is not None:
        limit = int(rules.memory_gb * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _exactly(error: Exception) -> str:
    """Why, for the site's own log."""
    return error.exactly if isinstance(error, WithheldError) else str(error)


def _request(experiment: Experiment) -> Request:
    federation, steps = experiment.federation, experiment.federation.local_steps
    return Request(
        recipe=recipe_digest(experiment),
        model=experiment.model.name,
        strategy=federation.strategy,
        rounds=federation.rounds,
        local_epochs=federation.local_epochs * experiment.train.samples_per_case if steps is None else None,
        local_steps=steps,
        epsilon=experiment.privacy.epsilon,
        delta=experiment.privacy.delta if experiment.privacy.on else None,
        noise=experiment.privacy.noise_multiplier,
        unit=experiment.privacy.unit,
        secure_aggregation=federation.secure_aggregation,
        quorum=federation.quorum,
    )


def _signer(rules: SiteConfig) -> Signer:
    """Speaks for this site to the others."""
    return Signer.read(rules.name, certificate=rules.certificate, key=rules.key, authority=rules.ca)


def _round(parcel: Parcel) -> int | None:
    value = parcel.text.get("round")
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _bytes(parcel: Parcel) -> int:
    return len(_text(parcel)) + sum(np.asarray(value).nbytes for value in parcel.arrays.values())


def _digest(parcel: Parcel) -> str:
    """Of all that leaves, so that it can be told later what did."""
    found = hashlib.sha256(_text(parcel))
    for name in sorted(parcel.arrays):
        found.update(name.encode())
        found.update(np.ascontiguousarray(parcel.arrays[name]).tobytes())
    return found.hexdigest()


def _text(parcel: Parcel) -> bytes:
    return json.dumps(dict(parcel.text), sort_keys=True).encode() if parcel.text else b""
