"""Add tokens to a base, such as those of ChatML, and let an adapter learn them.

python scripts/add_tokens.py --checkpoint_dir checkpoints/meta-llama/Llama-2-7b-hf --tokens "[<|im_start|>,<|im_end|>]"
"""

from dataclasses import dataclass, field
from pathlib import Path

from lit_qlora import cli
from lit_qlora.settings import Settings, check


@dataclass(frozen=True, kw_only=True)
class AddTokensConfig(Settings):
    """Add tokens to a base: a checkpoint beside it with rows in embedding and head, and names in the tokenizer.

    The base stays as it is. What a training makes of the new rows lies in the adapter.
    """

    checkpoint_dir: Path
    """The base, which stays as it is."""
    tokens: tuple[str, ...] | str
    """Names of the new tokens, e.g. '[<|im_start|>,<|im_end|>]'."""
    like: dict[str, str] = field(default_factory=dict)
    """Texts that new tokens begin like, e.g. '{<|im_end|>: </s>}': their row is the mean of the text's. Others begin as
    the mean of all rows."""
    control: bool = True
    """True for control tokens, which chat templates write and text never becomes. False for words that a text may
    spell, such as <think> in the answers of a data set."""
    out_dir: Path | None = None
    """Folder for the checkpoint. By default beside the base, NAME-tokens."""

    def __post_init__(self) -> None:
        """Check that there are tokens."""
        super().__post_init__()
        check(bool(self.tokens), "tokens is empty. Name at least one: [<|im_start|>,<|im_end|>].")


def main(config: AddTokensConfig) -> None:
    """Add them, and print their ids and the flags that train them."""
    from lit_qlora.commands import spell
    from lit_qlora.convert.new_tokens import add_tokens

    base = config.checkpoint_dir
    out_dir = config.out_dir or base.with_name(f"{base.resolve().name}-tokens")
    added = add_tokens(base, out_dir, config.tokens, config.like, config.control)
    kind = "control token" if config.control else "word"
    several = "s" if len(added.ids) > 1 else ""
    print(f"added {len(added.ids)} token{several} to {added.config.name}, {added.config.vocab_size:,} now: {out_dir}")
    for name, i in added.ids.items():
        begins = f"like {config.like[name]!r}" if name in config.like else "as the mean of all"
        print(f"  {i:>7} {name}   {kind}, begins {begins}")
    ids = ",".join(map(str, added.ids.values()))
    head = "" if added.config.tied_head else " --lora.train_head_rows true"
    print(f"Train them: {spell('finetune/lora.py')} --checkpoint_dir {out_dir} --lora.train_tokens [{ids}]{head}")


if __name__ == "__main__":
    cli.run(main, AddTokensConfig)
