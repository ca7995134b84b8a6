"""The model card (Mitchell et al., Model Cards for Model Reporting, FAT* 2019), rendered from facts alone."""

from __future__ import annotations

from collections.abc import Sequence

from medray.bundle.spec import BundleSpec
from medray.config.schema import Experiment
from medray.data.fingerprint import Fingerprint


def render_card(
    spec: BundleSpec,
    *,
    parameters: int,
    experiment: Experiment | None = None,
    fingerprint: Fingerprint | None = None,
    notes: Sequence[str] = (),
) -> str:
    """``card.md``: details, intended use, data, measures, analyses, limits, recommendations.

    Args:
        spec: of the bundle.
        parameters: of all members together.
        experiment: that trained it.
        fingerprint: of the training data.
        notes: limits, one sentence each.
    """
    names = ", ".join(dict.fromkeys(config.name for config in spec.members))
    network = f"{names} ({parameters:,} parameters)"
    if len(spec.members) > 1:
        how = "votes counted" if spec.vote else "averaged probabilities"
        if spec.weights is not None:
            how += ", weighted " + ", ".join(f"{weight:.2f}" for weight in spec.weights)
        network = f"ensemble of {len(spec.members)} networks, {how}: {network}"
    lines = [
        f"# Model card: {_text(spec.name)}",
        "",
        f"**{_text(spec.intended_use)}**",
        "",
        "## Model details",
        "",
        f"- Task: {spec.kind}, {spec.task.description}; {spec.ndim}-D, {spec.channels} channel(s), {spec.modality}",
        f"- Classes: {', '.join(_text(name) for name in spec.classes)}",
        f"- Network: {network}",
        f"- Written: {spec.created} with "
        + ", ".join(f"{library} {version}" for library, version in sorted(spec.versions.items())),
        f"- Calibration: temperature {spec.temperature:.3g}, fitted on validation cases",
    ]
    if spec.thresholds is not None:
        pairs = zip(spec.classes, spec.thresholds, strict=True)
        lines.append("- Thresholds: " + ", ".join(f"{_text(name)} {value:.3f}" for name, value in pairs))
    lines += [
        "",
        "## Intended use",
        "",
        f"{_text(spec.intended_use)} The answers are for research by people who can judge the images themselves. "
        "Out of scope: diagnosis, treatment, triage, and images unlike the training data in modality, body part, "
        "population or scanner.",
        "",
        "## Training data",
        "",
    ]
    lines += _data(experiment, fingerprint)
    lines += ["", "## Measures", ""]
    if spec.metrics:
        lines += ["| measure | value |", "|---|---|"]
        lines += [
            f"| {_text(name)} | {'not measured' if value is None else f'{value:.4g}'} |"
            for name, value in sorted(spec.metrics.items())
        ]
        lines += [
            "",
            "Values under `val/` were used to choose this model and are optimistic; those under `test/` were not.",
        ]
    else:
        lines.append("None was recorded. Measure with: `medray evaluate BUNDLE DATA`.")
    lines += [
        "",
        "## Limits and caveats",
        "",
        "- Nothing was measured on hospitals, scanners or populations other than those above, unless said so below.",
        "- The probabilities are calibrated on average over validation cases, not for each subgroup.",
        "- An image of another kind is answered too, and as surely: check the input.",
        *(f"- {_text(note)}" for note in notes),
        "",
        "## Before you rely on it",
        "",
        "Measure it on your own labelled cases (`medray evaluate BUNDLE DATA`), by site and patient group, and look at "
        "the worst cases. The golden outputs are re-checked by each runtime before it answers.",
        "",
    ]
    return "\n".join(lines)


def render_history(sentences: Sequence[str]) -> str:
    """What is appended to a card when a bundle is made from another one."""
    return "\n".join(["\n## Compression\n", *(f"- {_text(sentence)}" for sentence in sentences), ""])


def _data(experiment: Experiment | None, fingerprint: Fingerprint | None) -> list[str]:
    lines = []
    if experiment is not None:
        lines.append(f"- Source: `{_text(experiment.data)}`")
    if fingerprint is not None:
        lines.append(f"- {fingerprint.cases} cases of {fingerprint.patients} patients, without the test cases")
        if fingerprint.sites:
            sites = ", ".join(f"{_text(site)} ({count})" for site, count in sorted(fingerprint.sites.items()))
            lines.append(f"- Sites: {sites}")
        shape = " × ".join(str(size) for size in fingerprint.shape_median)
        spacing = fingerprint.spacing_median
        lines.append(
            f"- Median shape {shape}" + (f", spacing {' × '.join(f'{mm:.3g}' for mm in spacing)} mm" if spacing else "")
        )
        shares = ", ".join(f"{_text(name)} {count}" for name, count in fingerprint.class_cases.items())
        if shares:
            lines.append(f"- Cases that show each class: {shares}")
    return lines or ["Not recorded."]


def _text(value: str) -> str:
    """One line that can't break the Markdown around it (names come from folders and tables)."""
    return " ".join(value.split()).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
