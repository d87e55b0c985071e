"""Shared fixtures: tiny random models, a small tokenizer, the command line, and `../shared` if it exists."""

import io
import json
import os
import shutil
import sys
import tempfile

# Tests make no request to a hub; set before huggingface_hub is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# The command line sets it if stderr is not a terminal; tqdm reads it at import.
os.environ["TQDM_DISABLE"] = "1"
# Also for child processes: with one thread per core, two processes mostly wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import hypothesis
import pytest
import torch

WINDOWS = os.environ.get("BRACES_TEST_PLATFORM") == "windows"
if WINDOWS:
    from tests import windows

    windows.install()

# `--hypothesis-profile thorough` is for releases. No database of examples in the checkout.
for _profile, _examples in (("fast", 8), ("thorough", 2000)):
    hypothesis.settings.register_profile(
        _profile, max_examples=_examples, deadline=None, database=None, print_blob=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
hypothesis.settings.load_profile("fast")

# With tiny matrices a second thread slows down.
torch.set_num_threads(1)

SHARED = Path(__file__).resolve().parents[2] / "shared"

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
GATED = {**SIZES, "intermediate_size": 52, "num_key_value_heads": 2}
# Config class and sizes, with round and odd widths.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GATED),
    "qwen2": ("Qwen2Config", GATED),
    "qwen3": ("Qwen3Config", {**GATED, "head_dim": 8}),
    "mistral": ("MistralConfig", GATED),
    "gemma": ("GemmaConfig", {**GATED, "head_dim": 8}),
    "gpt2": ("GPT2Config", {**SIZES, "n_inner": 52, "n_positions": 64}),
    "gpt_neox": ("GPTNeoXConfig", {**SIZES, "intermediate_size": 52}),
    "opt": ("OPTConfig", {**SIZES, "ffn_dim": 52, "word_embed_proj_dim": 32}),
    "phi": ("PhiConfig", {**SIZES, "intermediate_size": 52}),
}


def tiny_model(name: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> Any:
    """Build a tiny random causal LM in eval mode.

    Norms and biases are random, too: an error in their use would not show at their initial 1 and 0.
    """
    import transformers

    kind, sizes = ARCHITECTURES[name]
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = getattr(transformers, kind)(**{**sizes, **special, **overrides})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.mul_(4)  # at the usual 0.02, FFN outputs are too small to show errors
    return model.to(dtype).eval()


def open_gates(adapter: Any, seed: int = 1) -> None:
    """Give an adapter random gates, c other than 1, and projections that are not orthonormal yet."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for index, (_, adapter_layer) in enumerate(adapter.adapted_ffns):
            adapter_layer.scale = (1.5, 0.75)[index % 2]
            for name, parameter in reversed(adapter_layer.stored.items()):
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                changed = {"gate": noise, "diagonal": noise / 2}
                parameter.copy_(changed.get(name, 1.5 * parameter + 0.1 * noise))


def tiny_tokenizer() -> Any:
    """Build a byte-level BPE of at most 96 tokens, with a start token and padding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = list(" abcdefghijklmnopqrstuvwxyz.,?!:'\"ABCDEQ0123456789\n")
    trainer = trainers.BpeTrainer(
        vocab_size=96,
        special_tokens=["<s>", "</s>", "<unk>"],
        initial_alphabet=[pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(c)[0][0] for c in alphabet],
    )
    tokenizer.train_from_iterator(["the film is good and the end is sad", "a happy day in the old town"] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="Device of the tests with the fixture `device`.")
    parser.addoption("--demo", type=Path, help="Folder of a finished `braces demo` to check instead of a new one.")


def pytest_configure(config: pytest.Config) -> None:
    """Use one cache of attributes for all tests and workers, not the user's."""
    if not hasattr(config, "workerinput"):
        os.environ["BRACES_CACHE"] = tempfile.mkdtemp(prefix="braces-tests-")


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ["BRACES_CACHE"], ignore_errors=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With `--device`, select the tests with the fixture `device`."""
    if config.getoption("--device") == "cpu":
        return
    chosen = [item for item in items if "device" in getattr(item, "fixturenames", ())]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, or the device of `--device`."""
    from braces_cli.core.models.load import pick_device

    return pick_device(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Llama and its tokenizer, for `--model`."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    tiny_model("llama", max_position_embeddings=128, vocab_size=96).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def chatty(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model of `model_dir` with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(model_dir, folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def embedded() -> Path:
    """Folder of the embedded model."""
    from braces_cli.core.models.hub import embedded_folder

    return embedded_folder()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real data and models next to the checkout; tests are skipped without it."""
    if not (SHARED / "models" / "stories260K").is_dir():
        pytest.skip("NOT TESTED on real data: ../shared/models/stories260K does not exist")
    return SHARED


@pytest.fixture
def session(model_dir: Path) -> Any:
    """Session of a tiny Llama, new for each test."""
    from braces_cli.core.adapter.model import open_session
    from braces_cli.core.options import LoadOptions

    return open_session(str(model_dir), None, LoadOptions(device="cpu"))


@pytest.fixture
def adapter_dir(session: Any, tmp_path: Path) -> Path:
    """Folder of an adapter of `model_dir` with random gates."""
    return make_adapter(session, tmp_path / "adapter")


def make_adapter(session: Any, folder: Path, rank: int = 4, seed: int = 1, relevance_to: str = "input") -> Path:
    """Save an adapter with random gates; the session's model stays without adapter."""
    from braces_cli.core.adapter.model import AdapterConfig, attach

    base = session.base
    adapter = attach(base.model, rank, relevance_to=relevance_to)
    open_gates(adapter, seed)
    config = AdapterConfig(base.name, rank, adapter.layers, base.sizes, tokenizer=base.tokenizer_hashes)
    adapter.save(folder, config, "# test\n")
    adapter.detach()
    return folder


@pytest.fixture
def in_process() -> Iterator[None]:
    """Verify exports in this process: starting another one takes seconds."""
    with verified_in_process():
        yield


@contextmanager
def verified_in_process() -> Iterator[None]:
    """See `in_process`."""

    def run(call: list[str], **options: Any) -> CompletedProcess:
        from braces_cli.export.verify_process import probe

        # Another process would not be profiled.
        profiler = sys.getprofile()
        sys.setprofile(None)
        probe(*call[-3:])
        sys.setprofile(profiler)
        return CompletedProcess(call, 0, "", "")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("braces_cli.export.verify.subprocess.run", run)
        yield


@pytest.fixture(scope="module")
def browser() -> Any:
    """Headless Chromium of the system, if installed."""
    api = pytest.importorskip("playwright.sync_api", reason="NOT TESTED in a browser: playwright is not installed")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("NOT TESTED in a browser: Chromium is not installed")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync"]
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, headless=True, args=flags)
        yield browser
        browser.close()


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture
def braces(capsys, monkeypatch):
    """Call `braces ARGS` with the given standard input."""
    from braces_cli.cli.main import main

    def call(*args: Any, stdin: str = "") -> Outcome:
        capsys.readouterr()
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        for stream in (sys.stdout, sys.stderr) if WINDOWS else ():
            stream.reconfigure(encoding="cp1252", errors="strict")
        with pytest.raises(SystemExit) as caught:
            main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return Outcome(caught.value.code, out, err)

    return call


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def mood_rows(tmp_path: Path) -> Path:
    """Twelve sentences with attribute and strength, which depend on the last word."""
    moods = [("good", "positive", 1.5), ("sad", "negative", 1.5), ("old", "neutral", 0)]
    rows = [
        {"text": f"the {noun} is {word}", "mood": mood, "how": how}
        for noun in ("film", "town", "end", "day")
        for word, mood, how in moods
    ]
    return write_rows(tmp_path / "moods.jsonl", rows)


@pytest.fixture
def train(braces: Any, model_dir: Path, mood_rows: Path) -> Any:
    """Call `braces train` on `mood_rows`, or on the rows `data`; None as `base` or `rank` leaves out the option."""

    def call(
        out: Path, *options: Any, data: Path = mood_rows, base: Path | None = model_dir, rank: int | None = 4
    ) -> Outcome:
        given = [*(() if base is None else ("--model", base)), *(() if rank is None else ("--rank", rank))]
        return braces(
            "train", *given, "--data", data, "--lr", 0.01, "--device", "cpu", "--output-dir", out,
            "--format", "json", *options,
        )  # fmt: skip

    return call
