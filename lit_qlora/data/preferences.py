"""The data of a run on comparisons: judged answers, encoded, split by prompt, audited and laid out."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from lit_qlora.data.audit import MOST, audit
from lit_qlora.data.batches import order, validation_batches
from lit_qlora.data.cache import Encoded
from lit_qlora.data.comparisons import CHOSEN, ELSEWHERE, REJECTED, Comparisons, Layout, shared_tokens
from lit_qlora.data.exclude import hash_of, leave_out
from lit_qlora.data.load import (
    RunData,
    batching_of,
    choose_style,
    encode_source,
    excluded,
    length_limit,
    limited,
    model_of,
    split,
)
from lit_qlora.data.samples import Counts, Sample, Samples
from lit_qlora.data.sources import find_sources
from lit_qlora.errors import DataError
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.scoring import Scoring
from lit_qlora.prompts.tokenizer import Tokenizer
from lit_qlora.settings import DataConfig, FinetuneConfig, PreferenceConfig, TrainConfig

DRIFT = -3  # epoch of the order that pairs prompts with the answers to others; see load.SPLIT
BIASED = 0.7  # share of pairs with a longer chosen answer, or a shorter one, from which on a note says so


def can_share(model: ModelConfig, train: TrainConfig) -> bool:
    """Tell whether answers to one prompt can share its tokens."""
    # The kernel of capped scores and of dropout has as many keys as queries.
    return model.shares_beginnings and model.attention_softcap is None and not train.hidden_dropout


def read_preferences(config: FinetuneConfig, how: PreferenceConfig) -> RunData:
    """Read, encode, split, audit and lay out judged answers.

    Raises:
        UsageError, DataError, CheckpointError: for everything that can be known before a weight is loaded.
    """
    model, data = model_of(config), config.data
    tokenizer, style = Tokenizer(config.checkpoint_dir), choose_style(data, config.checkpoint_dir)
    most, seed = length_limit(data, model), config.seed if data.seed is None else data.seed
    kind = "pairs" if how.published.paired else "singly"
    sources, val_source = find_sources(data.path, data.val_path)
    if data.validation_strategy == "automatic":
        val_source = None
    everything = [
        encode_source(source, data, config.checkpoint_dir, tokenizer, style, most, kind)  # type: ignore[arg-type]
        for source in [*sources, *([val_source] if val_source else [])]
    ]
    encoded, val = everything[: len(sources)], everything[len(sources)] if val_source else None
    chosen, held_out = split([_heads(one) for one in encoded], val and _heads(val), data, seed)
    if data.exclude:
        chosen = leave_out(data.exclude, [_hashes(one) for one in encoded], chosen)
    chosen = limited(chosen, data, seed)
    layout = Layout(how.share_prompts and can_share(model, config.train), how.ld_alpha, how.sft_prompts)
    train = _joined([_take(one, some, layout) for one, some in zip(encoded, chosen, strict=True)])
    kept = [_take(one, some, layout) for one, some in zip(encoded, held_out, strict=True)]
    compared = _joined([_take(val, range(len(_bounds(val)) - 1), layout)] if val else kept)
    of_train, of_val = (
        [_answers(one, some) for one, some in zip(encoded, which, strict=True)] for which in (chosen, held_out)
    )
    found = audit(train.samples, encoded, val, of_train, of_val, data, most)
    red = [*found.red, *_red(train, how, data)]
    if red:
        raise DataError("\n       ".join(red))
    tokenizer.require_embedding(np.unique(train.samples.tokens).tolist())
    further = tuple(notes(train, encoded, chosen, how))
    if not how.published.paired:
        if len(train) < 2:
            raise DataError("preference.loss kto compares with answers to other prompts, and there is only one answer.")
        train, compared = elsewhere(train, seed, most), elsewhere(compared, seed, most)
    if how.loss == "reward":
        train, compared = to_their_ends(train), to_their_ends(compared)
    compared = compared.take(range(len(compared))[: config.eval.max_samples])
    firsts = compared.samples.take(compared.bounds[:-1].tolist())
    shares = tuple((len(some), source.times) for some, source in zip(chosen, sources, strict=True))
    batching = batching_of(config, seed, most, shares if any(times != 1 for _, times in shares) else (), tokenizer)
    if batching.row_length is not None:  # a comparison has room in it
        longest = int(max([batching.row_length, *(train.lengths - 1), *(compared.lengths - 1)]))
        batching = replace(batching, row_length=longest)
    return RunData(
        train=train,
        val_batches=validation_batches(firsts, config.train.micro_batch_size),
        val_samples=len(compared),
        batching=batching,
        style=style,
        max_length=most,
        tokenizer=tokenizer,
        audit=replace(found, train=len(train), val=len(compared), red=[], further=further),
        files={one.facts.source: one.facts.sha256 for one in everything} | excluded(data),
        val=compared,
        scoring=Scoring("regress") if how.loss == "reward" else None,
    )


def _bounds(encoded: Encoded) -> Counts:
    """The first answer of each record, and the end of the last."""
    return np.append(np.flatnonzero(~encoded.joined), len(encoded.joined)).astype(np.int64)


def _heads(encoded: Encoded) -> Encoded:
    """The same with one sample for each record, for a split of records."""
    heads = _bounds(encoded)[:-1]
    alone = np.zeros(len(heads), np.bool_)
    samples = encoded.samples.take(heads.tolist())
    return replace(encoded, samples=samples, joined=alone, digests=encoded.digests[heads])


def _hashes(encoded: Encoded) -> list[str]:
    """The hash of each record."""
    return [hash_of(*encoded.samples[start:end]) for start, end in pairwise(_bounds(encoded).tolist())]


def _answers(encoded: Encoded, records: Sequence[int]) -> list[int]:
    """The numbers of the answers of these records."""
    bounds = _bounds(encoded)
    return [i for record in records for i in range(int(bounds[record]), int(bounds[record + 1]))]


def _take(encoded: Encoded, records: Sequence[int], layout: Layout) -> Comparisons:
    at, bounds = _answers(encoded, records), _bounds(encoded)
    counts = np.diff(bounds)[list(records)] if len(records) else np.zeros(0, np.int64)
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]).astype(np.int64)
    margins = encoded.margins[bounds[:-1][list(records)]] if len(records) else np.zeros(0, np.float32)
    return Comparisons(encoded.samples.take(at), ends, encoded.sides[at], margins, layout)


def _joined(parts: Sequence[Comparisons]) -> Comparisons:
    """The comparisons of all parts, one part after the other."""
    ends = np.cumsum([0, *(len(part.samples) for part in parts)])
    bounds = [part.bounds[:-1] + end for part, end in zip(parts, ends, strict=False)]
    return Comparisons(
        Samples.joined([part.samples for part in parts]),
        np.append(np.concatenate(bounds), ends[-1]).astype(np.int64),
        np.concatenate([part.sides for part in parts]),
        np.concatenate([part.margins for part in parts]),
        parts[0].layout,
    )


def elsewhere(singles: Comparisons, seed: int, most: int) -> Comparisons:
    """Single answers, each beside the answer to another prompt, on which KTO measures how far the model drifted."""
    count = len(singles)
    if count < 2:
        return singles
    around = order(count, seed, DRIFT)
    following = dict(zip(around, [*around[1:], around[0]], strict=True))
    samples = [one for i in range(count) for one in (singles.samples[i], _beside(singles, i, following[i], most))]
    sides = np.stack((singles.sides, np.full(count, ELSEWHERE, np.int8)), axis=1).flatten()
    bounds = np.arange(0, 2 * count + 1, 2, dtype=np.int64)
    return Comparisons(Samples.of(samples), bounds, sides, singles.margins, singles.layout)


def to_their_ends(comparisons: Comparisons) -> Comparisons:
    """The comparisons with a label behind the last token of each answer alone, where a head reads its number."""
    ended = Samples.of(Sample.of([*one.tokens.tolist(), 0], len(one.tokens)) for one in comparisons.samples)
    c = comparisons
    return Comparisons(ended, c.bounds, c.sides, c.margins, c.layout, c.reference)


def _beside(singles: Comparisons, i: int, other: int, most: int) -> Sample:
    """The prompt of one answer and the other answer."""
    asked, said = singles.samples[i], singles.samples[other]
    prompt = int(np.argmax(asked.trained))
    tokens = [*asked.tokens[:prompt].tolist(), *said.tokens[int(np.argmax(said.trained)) :].tolist()]
    return Sample.of(tokens[:most], prompt)


def notes(
    comparisons: Comparisons, encoded: Sequence[Encoded], chosen: Sequence[Sequence[int]], how: PreferenceConfig
) -> list[str]:
    """Say what a user should know of judged answers before the run."""
    sides, labelled = comparisons.sides, comparisons.samples.labelled
    if not how.published.paired:
        good, bad = int((sides == CHOSEN).sum()), int((sides == REJECTED).sum())
        uneven = max(good, bad) > 2 * min(good, bad) and how.desirable_weight == how.undesirable_weight
        advice = "; weigh the fewer more, see --preference.desirable_weight" if uneven else ""
        return [f"{good:,} good and {bad:,} bad answers{advice}"]
    firsts = comparisons.bounds[:-1]
    rejected = np.flatnonzero(sides == REJECTED)
    partner = firsts[np.searchsorted(firsts, rejected, side="right") - 1]
    longer = float(np.mean(labelled[partner] > labelled[rejected]))
    shorter = float(np.mean(labelled[partner] < labelled[rejected]))
    middle = [int(np.median(labelled[which])) for which in (firsts, rejected)]
    found = [f"{len(rejected):,} pairs; median tokens of chosen answers {middle[0]}, of rejected ones {middle[1]}"]
    by_token = how.loss in ("ipo", "orpo", "simpo") or how.length_normalized
    for word, share in (("longer", longer), ("shorter", shorter)) if not by_token else ():
        if share >= BIASED:
            found.append(
                f"{share:.0%} of the chosen answers are the {word} ones, so length alone may be learnt; "
                "losses that compare by token mind it less: ipo, simpo, or --preference.length_normalized true"
            )
    cut = np.concatenate([(one.lengths > one.samples.lengths)[_answers(one, s)] for one, s in zip(encoded, chosen)])  # noqa: B905
    one_side = int((cut[partner] != cut[rejected]).sum())
    if one_side:
        found.append(
            f"in {one_side:,} pairs one side was cut, and the other was not; --data.overlong drop leaves these out"
        )
    differ = differing_prompts(comparisons)
    if differ:
        found.append(f"in {differ:,} comparisons the prompts of the answers differ")
    return found


def differing_prompts(comparisons: Comparisons) -> int:
    """Count the comparisons whose answers stand behind different prompts."""
    return sum(_prompts_differ(comparisons[i].answers) for i in range(len(comparisons)))


def _prompts_differ(answers: Sequence[Sample]) -> bool:
    prompts = [int(np.argmax(answer.trained)) for answer in answers]
    return len(set(prompts)) > 1 or shared_tokens(answers) < max(0, prompts[0] - 1)


def _red(comparisons: Comparisons, how: PreferenceConfig, data: DataConfig) -> list[str]:
    """Reasons not to start that concern judged answers alone."""
    red = []
    if comparisons.margins.any() and not how.published.margins:
        red.append(
            f"The loss {how.loss} does not read the column 'margin'. Leave the column out, or take another loss."
        )
    several = bool((np.diff(comparisons.bounds) > 2).any())
    if several and how.ld_alpha != 1:
        red.append("preference.ld_alpha is for pairs, and some records have several rejected answers.")
    if how.published.paired and "prompts_differ" not in data.allow:
        differ = differing_prompts(comparisons)
        if differ > MOST * len(comparisons):
            red.append(
                f"{differ:,} of {len(comparisons):,} comparisons have answers to different prompts, or go on with "
                "--data.allow prompts_differ."
            )
    return red
