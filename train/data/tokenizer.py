"""Tokenizers: Mixtral's own, one trained on the corpus, or any from a folder or the hub."""

import importlib.resources
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from datasets import Dataset
from jinja2 import TemplateError
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils.chat_template_utils import render_jinja_template

from train.data.formats import texts_of
from train.data.hub import require_hub, split_revision
from train.errors import CheckpointError, ConfigError, MachineError

UNKNOWN, BEGIN, END = "<unk>", "<s>", "</s>"  # ids 0, 1, 2, as in Mixtral's own vocabulary
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json")
# Mixtral-8x7B-Instruct's. The answer, its leading space and its end mark are what an assistant mask covers.
INSTRUCT_TEMPLATE = """\
{{- bos_token }}
{%- set has_system = messages[0]['role'] == 'system' %}
{%- set system = messages[0]['content'] + '\\n\\n' if has_system else '' %}
{%- set turns = messages[1:] if has_system else messages %}
{%- for message in turns %}
    {%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}
        {{- raise_exception('after an optional system message, roles must be user, assistant, user, ...') }}
    {%- elif message['role'] == 'user' %}
        {{- '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}
    {%- else %}
        {%- generation %}{{- ' ' + message['content'] + eos_token }}{%- endgeneration %}
    {%- endif %}
{%- endfor %}
"""


def open_tokenizer(
    name: str, vocab_size: int, corpus: Dataset | None = None, chat_template: str | None = None
) -> PreTrainedTokenizerBase:
    """Opens or trains the tokenizer that `data.tokenizer` names.

    Args:
        name: `mixtral`, `train_bpe`, a folder, a hub id or ID@REVISION.
        vocab_size: V of the model.
        corpus: the training documents, for `train_bpe`.
        chat_template: to give it; see `give_template`.

    Returns:
        A tokenizer with begin and end tokens, no larger than the embedding.

    Raises:
        ConfigError: when it is larger than the embedding, lacks an end token or wants code of its own to be run.
        CheckpointError: when what is in the folder is no tokenizer, or damaged.
        MachineError: when it is neither a folder nor to be had from the hub.
    """
    if name == "mixtral":
        tokenizer = mixtral_tokenizer()
    elif name == "train_bpe":
        if corpus is None:
            raise ValueError("train_bpe needs a corpus")
        tokenizer = train_bpe(corpus, vocab_size)
    else:
        tokenizer = _given_tokenizer(name)
    rows = max(tokenizer.get_vocab().values()) + 1  # ids may have gaps
    if rows > vocab_size:
        raise ConfigError(
            f"data.tokenizer={name} has {rows} tokens, but the embedding only {vocab_size}: "
            f"set model.vocab_size={rows} or more"
        )
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"data.tokenizer={name} has no end token, which marks the border between documents")
    give_template(tokenizer, chat_template)
    return tokenizer


def _given_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Opens a tokenizer in a folder or on the hub, without ever running code that comes with it."""
    repository, revision = name, None
    is_folder = Path(name).is_dir()
    if not is_folder:
        repository, revision = split_revision(name)
        require_hub(f"data.tokenizer={name}")
    options = {"revision": revision or "main"}
    try:
        if get_tokenizer_config(repository, **options).get("auto_map"):  # transformers may take another class silently
            raise ConfigError(
                f"data.tokenizer={name} wants code of its own to be run (auto_map), which never is: name a tokenizer "
                "that transformers has"
            )
        return AutoTokenizer.from_pretrained(repository, **options, trust_remote_code=False)
    except ConfigError:
        raise
    except Exception as error:  # tokenizers raises nothing narrower
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if is_folder or not isinstance(error, OSError | ValueError):
            place = _unreadable(Path(name)) if is_folder else f"data.tokenizer={name}"
            raise CheckpointError(f"{place}: no tokenizer that can be read ({reason})") from None
        raise MachineError(
            f"data.tokenizer={name}: no such folder, and not to be had from the hub ({reason})"
        ) from None


def _unreadable(folder: Path) -> Path:
    """Finds the file of a tokenizer's folder that cannot be read; the folder where it is none of them."""
    for path in (folder / name for name in FILES if (folder / name).is_file()):
        try:
            if path.name == "tokenizer.json":
                Tokenizer.from_file(str(path))
            else:
                json.loads(path.read_text(encoding="utf-8"))
        except Exception:  # tokenizers raises nothing narrower
            return path
    return folder


def document_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Turns texts into ids, each between the begin token, if there is one, and the end token.

    A "</s>" in a text is text: it becomes the ids of its characters, not the end token.
    """
    if not texts:
        return []
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    options = {"add_special_tokens": False, "split_special_tokens": True, "return_attention_mask": False}
    return [[*begin, *ids, tokenizer.eos_token_id] for ids in tokenizer(texts, **options, verbose=False)["input_ids"]]


def train_bpe(corpus: Dataset, vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE, which represents every text exactly.

    Args:
        corpus: documents.
        vocab_size: number of tokens, special ones included; a small corpus may yield fewer.

    Raises:
        ConfigError: when 256 bytes and the special tokens do not fit.
    """
    special = [UNKNOWN, BEGIN, END]
    if vocab_size < 256 + len(special):
        raise ConfigError(f"model.vocab_size={vocab_size}: data.tokenizer=train_bpe needs {256 + len(special)} or more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def batches() -> Iterator[list[str]]:
        for start in range(0, len(corpus), 256):
            rows = corpus.select(range(start, min(start + 256, len(corpus))))
            yield [text for document in rows for text in texts_of(document)]

    tokenizer.train_from_iterator(batches(), trainer=trainer, length=len(corpus))
    return _wrap(tokenizer)


def mixtral_tokenizer() -> PreTrainedTokenizerFast:
    """Builds Mixtral-8x7B's tokenizer, id for id, from the sentencepiece file that mistral-common ships."""
    return sentencepiece_tokenizer(mixtral_model())


def mixtral_model() -> bytes:
    """Returns the sentencepiece model of Mixtral-8x7B's tokenizer, its `tokenizer.model`."""
    return (importlib.resources.files("mistral_common") / "data" / "tokenizer.model.v1").read_bytes()


def sentencepiece_tokenizer(model: bytes) -> PreTrainedTokenizerFast:
    """Builds a tokenizer, id for id, from a sentencepiece BPE such as Mistral's `tokenizer.model`.

    A sentencepiece BPE merges by the score of the piece that results, so the merges are every split of
    every piece into two known pieces, by that score.

    Args:
        model: the file's content.

    Raises:
        ValueError: when it is no sentencepiece model with <unk>, <s>, </s> as ids 0, 1, 2.
    """
    try:
        pieces = SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise ValueError(f"not a sentencepiece model: {error}") from None
    if [pieces.id_to_piece(index) for index in range(min(3, pieces.vocab_size()))] != [UNKNOWN, BEGIN, END]:
        raise ValueError(f"expected {UNKNOWN}, {BEGIN}, {END} as ids 0, 1, 2")
    vocabulary = {pieces.id_to_piece(index): index for index in range(pieces.vocab_size())}
    merges: list[tuple[float, str, str]] = []
    for piece, index in vocabulary.items():
        if pieces.is_control(index) or pieces.is_unknown(index) or pieces.is_byte(index):
            continue
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [(left, right) for left, right in splits if left in vocabulary and right in vocabulary]
        known.sort(key=lambda split: (vocabulary[split[0]], vocabulary[split[1]]))
        merges += [(pieces.get_score(index), left, right) for left, right in known]
    merges.sort(key=lambda merge: -merge[0])
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            [(left, right) for _, left, right in merges],
            unk_token=UNKNOWN,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    control = [piece for piece, index in vocabulary.items() if pieces.is_control(index)]
    return _wrap(tokenizer, [UNKNOWN, *control])


def add_instruct_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives a tokenizer Mixtral-8x7B-Instruct's chat template, with the answers marked for an assistant mask.

    Raises:
        ConfigError: for a vocabulary in which [INST] is a token, as in later releases: their template is another.
    """
    if tokenizer.convert_tokens_to_ids("[INST]") not in (None, tokenizer.unk_token_id):
        raise ConfigError("the tokenizer has a token [INST], so Mixtral-8x7B-Instruct's chat template does not fit it")
    tokenizer.chat_template = INSTRUCT_TEMPLATE


def give_padding(tokenizer: PreTrainedTokenizerBase) -> int:
    """Names a padding token where a tokenizer has none: the unknown one, else the end; returns its id."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token if tokenizer.unk_token_id is not None else tokenizer.eos_token
    padding: int = tokenizer.pad_token_id
    return padding


def give_template(tokenizer: PreTrainedTokenizerBase, choice: str | None) -> None:
    """Gives a tokenizer the chat template that `data.chat_template` names.

    Raises:
        ConfigError: when it cannot be read, or does not fit.
    """
    if choice == "mixtral":
        add_instruct_template(tokenizer)
    elif choice not in (None, "none"):
        assert choice is not None
        try:
            template = Path(choice).expanduser().read_text(encoding="utf-8")
            render_jinja_template([], chat_template=template)  # compiles it
        except (OSError, UnicodeDecodeError, TemplateError) as error:
            raise ConfigError(f"data.chat_template={choice}: no template that can be read ({error})") from None
        tokenizer.chat_template = template


def _wrap(tokenizer: Tokenizer, special: Sequence[str] = (UNKNOWN, BEGIN, END)) -> PreTrainedTokenizerFast:
    """Adds the special tokens, and the begin token before every encoded text."""
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
