"""How a model answers, as data: what files under `configs/inference/` fill.

`v4jax batch`, `generate`, `evaluate` and `plan` take such a file with `--config=FILE.py`. Every
field is also a flag, which replaces the file's value; the `Attributes` here are the flags' help.
`config.loading.load_run(InferenceConfig, …)` makes one.
"""

import dataclasses
import re
from typing import Literal

from v4jax.config.json_keys import brief
from v4jax.config.ranges import MAX_SEED, MOST_TOKENS, check_ranges, within
from v4jax.config.run import MeshConfig
from v4jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class FrameConfig:
    """What surrounds the user's words; `inference.Frame` renders it.

    Attributes:
      system: System message.
      thinking: Reason before answering.
      effort: How long to reason, with thinking: "max" (as long as it takes), "high" or, with
        profile 0731, "low".
      profile: Generation of the checkpoint, which decides how an effort is asked for: preview for
        V4-Flash and V4-Pro, 0731 for V4-Flash-0731 and V4-Pro-0813. By default the checkpoint says
        it, by its prompt encoder or its draft module.
    """

    system: str | None = None
    thinking: bool = False
    effort: str | None = None
    profile: Literal["preview", "0731"] | None = None


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How the tokens of an answer are chosen; `inference.SamplingOptions` checks it.

    Attributes:
      temperature: Divides the logits; 0 takes the most probable token (greedy).
      top_p: Keeps the most probable tokens that together reach this probability, in (0, 1].
      top_k: Keeps so many of the most probable tokens; 0 keeps all.
      seed: The same seed and prompt give the same answer.
      max_new_tokens: Ends an answer that has not ended itself; at least 1.
      logprobs: Give the log-probability of every token of an answer too: what the model assigns to
        it, without temperature and cut. They are computed after the answer, by reading it again.
    """

    temperature: float = within(0, 1e6, 0.0)
    top_p: float = within(0, 1, 1.0)  # 0 itself is refused where the options are checked
    top_k: int = within(0, 1 << 24, 0)
    seed: int = within(0, MAX_SEED, 0)
    max_new_tokens: int = within(1, MOST_TOKENS, 256)
    logprobs: bool = False


@dataclasses.dataclass(frozen=True)
class InferenceConfig:
    """One model at work: what it is, where it is and how it answers.

    Attributes:
      model: Checkpoint folder (released or transformers layout), a repository of the Hugging Face
        hub (hf://org/name, hf://org/name@revision, org/name), or a packaged name: nano, a small
        trained model, or tiny, random weights for trying things out. Required.
      numerics: How the computation rounds: float32 (for parity and research), bfloat16, or released
        (exactly as the published inference code). By default released for large models and float32
        for small ones.
      weights_seed: Use random weights of a packaged configuration, made from this seed. By default
        its trained weights if it has some (nano), else seed 0.
      adapters: Folder of adapters (LoRA) that train or PEFT wrote. They stay beside the model's
        weights, which stay as they are stored. Each pass of the model expands the weights that have
        some, which takes time; v4jax convert merges them once.
      mesh: Sizes of the mesh axes data, expert, context, tensor, such as expert=8; their product is
        the number of devices of all hosts. data=1 uses one device. By default expert has all
        devices, and context those that do not divide the experts. v4jax plan says what fits.
      chunk_tokens: Tokens read at once. Larger chunks read faster and need more memory. By default
        4096; on a mesh 1024 for each device that shares a sequence, if that is more.
      max_tokens: Capacity of the cache, prompt and answer together. By default the length needed,
        rounded up to a power of two.
      questions_at_once: Number of questions of one document that are answered side by side, each
        with a copy of its cache.
      speculate: How many tokens are drafted and then verified in one step of the model: auto (as
        many as the checkpoint's draft module proposes, one by an MTP block, none without either),
        off, or a number. Drafts change the speed and not the distribution of answers; greedy
        answers stay the same.
      frame: What surrounds the user's words.
      sampling: How the tokens of an answer are chosen.
    """

    model: str
    numerics: Literal["float32", "bfloat16", "released"] | None = None
    weights_seed: int | None = within(0, MAX_SEED, None)
    adapters: str | None = None
    mesh: MeshConfig | None = None
    chunk_tokens: int | None = within(1, MOST_TOKENS, None)
    max_tokens: int | None = within(1, MOST_TOKENS, None)
    questions_at_once: int = within(1, 1 << 16, 4)
    speculate: str = "auto"
    frame: FrameConfig = FrameConfig()
    sampling: SamplingConfig = SamplingConfig()

    def __post_init__(self):
        check_ranges(self, "inference.")
        check_ranges(self.sampling, "inference.sampling.")
        digits = re.fullmatch("[0-9]{1,4}", self.speculate)
        count = int(self.speculate) if digits else 0
        if self.speculate not in ("auto", "off") and not count:
            raise ConfigError(
                "inference.speculate must be auto, off or a number of tokens of at least 1, got "
                f"{brief(self.speculate)}"
            )
