"""What is drawn and tabled of each measurement, by its name; a measurement that is not here has its rows and no figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pandas as pd
from matplotlib.figure import Figure

from . import robustness
from .controls import control_figures, control_rows
from .forest import forest
from .measured import Measurements, conditions, read, summary
from .points import variants_apart
from .tails import tail_figures, tail_rows
from .tracks import Axis, tracks

STEERING = (
    "Steering score: harmonic mean of concept (detector's score of the text minus the unsteered texts' mean, at least 0) and fluency "
    "(likelihood under the clean model beside the unsteered text, times variety), mean over texts of held-out prompts"
)
ABLATION = "Selected by AUROC on other documents; random controls have the same sites and activity"


def _steering(frame: pd.DataFrame) -> dict[str, Figure]:
    found = read(frame, "factor")
    factors = sorted({float(at) for at in found.data[found.data["kind"] != "baseline"]["at"] if at != "chosen"})
    grid = f" Factors |dy|/|y|: {', '.join(f'{factor:g}' for factor in factors)}."
    score = f"{STEERING}, at the factor that is best on other prompts.{' '}" + conditions(found, "prompts", grid)
    front = "Concept against fluency of steered text along the factor, mean over concepts; bars over prompts. " + conditions(
        found, "prompts", grid
    )
    return {
        "steering_score": forest(found, "steering_score", "chosen", "prompts", "Steering score", score),
        "steering_frontier": tracks(
            found, Axis("steering_concept", "Concept"), Axis("steering_fluency", "Fluency"), "prompts", front, controls=False
        ),
    }


def _at(found: Measurements) -> str:
    """The damage at which most entries have an interval over documents, the largest of those."""
    data = found.of("ablation_on_at_damage", "documents")
    counts = data.assign(known=data["lo"].notna()).groupby("at")["known"].sum()
    if counts.empty:
        raise ValueError("nothing to draw: no damage was reached")
    return max(counts.index, key=lambda at: (counts[at], float(at)))


def _ablation(frame: pd.DataFrame) -> dict[str, Figure]:
    found = read(frame, "damage")
    at = _at(found)
    same = conditions(found, "documents")
    selective = f"Selectivity on/(on + |off|) where other text loses {at} nats a token; at 0.5 (dotted) both lose alike. {ABLATION}. {same}"
    along = f"Selectivity on/(on + |off|) where other text loses as much as the x axis says. {ABLATION} (lighter, hollow). {same}"
    return {
        "ablation_selectivity": forest(
            found, "ablation_selectivity_at_damage", at, "documents", f"Selectivity at {at} nats/token elsewhere", selective, 0.5
        ),
        "ablation_by_damage": tracks(
            found,
            Axis("at", "Loss on other text (nats/token)", True),
            Axis("ablation_selectivity_at_damage", "Selectivity"),
            "documents",
            along,
            controls=True,
        ),
    }


def _steering_table(frame: pd.DataFrame) -> Sequence[Mapping[str, object]]:
    return summary(read(frame, "factor"), "steering_score", "steering_gain", "chosen")


def _ablation_table(frame: pd.DataFrame) -> Sequence[Mapping[str, object]]:
    found = read(frame, "damage")
    return summary(found, "ablation_on_at_damage", "ablation_gain", _at(found))


RULE = (
    "Rule of a few token literals made on fold A and scored on fold C as a detector of activity; half of the inactive positions are near "
    "misses"
)
INTRUDER = "Share of intruders found among four contexts of one band of size, by cosine of TF-IDF of the words around"
PURITY = "1 - H(token where active) / H(token at as many other positions); zero where activity has nothing to do with the token"
CAUTION = "Proxies: they say how far contexts predict activity under a fixed local model, not what a person understands."
DRAW = "Components drawn over strata of density by one rule for all. Hollow: random directions, each as dense as the component beside it"
JACOBIAN = (
    "Cosine of the Jacobians of the original and the replacement MLP by its input, mean over sampled positions and layers; gates and all "
    "other inputs held. Hollow: the replacement's Jacobian at another position of the same row"
)
DIRECTIONS = ("drawn components", "random directions as dense")


def _where(found: Measurements, units: str) -> str:
    """The sentences of a caption about target, data and intervals."""
    facts = found.facts
    out = f" Left out: {'; '.join(found.left_out)}." if found.left_out else ""
    return (
        f"Target {facts['target']} ({facts['target_hash'][:8]}), layers {facts['layers']}; {facts['dataset']} "
        f"(tokens {facts['token_hash'][:8]}). Gates clean. At most {facts.get(f'n_{units}', '0')} {units} an entry. "
        f"Intervals: 95% bootstrap over {units}; {facts['seeds'].replace('document', 'that')}.{out}"
    )


def _interpretability(frame: pd.DataFrame) -> dict[str, Figure]:
    found = read(frame, "at", "component")
    same = f"{DRAW}. {CAUTION} {_where(found, 'components')}"
    forests = (
        ("rule_auroc", "AUROC of a small rule", RULE, 0.5),
        ("intruder_words", "Intruders found", INTRUDER, 0.2),
        ("purity_token", "Purity of the token", PURITY, 0.0),
    )
    made = {
        key: forest(found, key, "all", "components", label, f"{text}. Dotted: chance. {same}", zero, DIRECTIONS)
        for key, label, text, zero in forests
        if not found.of(key, "components", at="all").empty
    }
    along = f"{RULE}, by quantile of the size of what is active. {same}"
    axes = (Axis("at", "Quantile of size"), Axis("rule_auroc", "AUROC of a small rule"))
    return made | {"rule_auroc_by_size": tracks(found, *axes, "components", along, controls=True)}


def _jacobian(frame: pd.DataFrame) -> dict[str, Figure]:
    found = read(frame, "at", "mlp")
    marks = ("replacement", "its Jacobian of another position")
    text = f"{JACOBIAN}. {_where(found, 'documents')}"
    return {"jacobian_cosine": forest(found, "jacobian_cosine", "all", "documents", "Cosine of Jacobians", text, 0.0, marks)}


def _autointerp(frame: pd.DataFrame) -> dict[str, Figure]:
    found = read(frame, "at", "component")
    text = (
        "Balanced accuracy of a language model that tells active from inactive contexts by an explanation that another made from other "
        "documents; half of the inactive ones are near misses (dotted: chance). Hollow: by the explanation of another component. Replies "
        f"that cannot be read are missing, not wrong. Components drawn over strata of density. {_where(found, 'components')}"
    )
    marks = ("own explanation", "another component's")
    return {
        key: forest(found, key, "all", "components", label, text, 0.5, marks)
        for key, label in (("autointerp_detection", "Detection"), ("autointerp_fuzzing", "Fuzzing"))
        if not found.of(key, "components", at="all").empty
    }


DRAWN: dict[str, Callable[[pd.DataFrame], dict[str, Figure]]] = {
    "controls": control_figures,
    "steering": _steering,
    "tails": tail_figures,
    "topic_ablation": _ablation,
    "interpretability": _interpretability,
    "jacobian": _jacobian,
    "autointerp": _autointerp,
    "robustness": robustness.figures,
    "mass_ablation": robustness.mass_figures,
}
TABLED: dict[str, Callable[[pd.DataFrame], Sequence[Mapping[str, object]]]] = {
    "controls": control_rows,
    "steering": _steering_table,
    "tails": tail_rows,
    "topic_ablation": _ablation_table,
    "interpretability": lambda frame: summary(read(frame, "at", "component"), "rule_auroc", "rule_auroc_gain", "all", "components"),
    "jacobian": lambda frame: summary(read(frame, "at", "mlp"), "jacobian_cosine", "jacobian_gain", "all", "documents"),
    "autointerp": lambda frame: summary(
        read(frame, "at", "component"), "autointerp_detection", "autointerp_detection_gain", "all", "components"
    ),
    "robustness": robustness.table,
    "mass_ablation": robustness.mass_table,
}


CONCEPTS = "over all that was measured; brackets: 95%; gain: above the mean of random controls"
NOTES = {
    "robustness": "error a token under each kind of mask, after some steps of an adversary, and of the summed weights (relative)",
    "controls": "brackets: 95%; tells: better than the control and the intervals apart; fooled: worse and apart; blind: not apart",
    "mass_ablation": "error a token with every component on but a share of the inactive ones; any: as many of all off instead",
    "tails": "what lies beyond so many of a token's largest components, mean over sites",
}


def measured_note(name: str) -> str:
    """What a reader of a measurement's table has to know."""
    return NOTES.get(name, CONCEPTS)


def measured_figures(name: str, frame: pd.DataFrame) -> dict[str, Figure]:
    """The figures of a measurement's rows, none for a measurement that has none; raises ValueError with one line."""
    return DRAWN[name](variants_apart(frame)) if name in DRAWN else {}


def measured_table(name: str, frame: pd.DataFrame) -> Sequence[Mapping[str, object]]:
    """A measurement's rows in brief, none for a measurement that has no table; raises ValueError with one line."""
    return TABLED[name](variants_apart(frame)) if name in TABLED else []
