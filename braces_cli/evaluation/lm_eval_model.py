"""A base with an adapter and steering as a model of lm-eval's command line.

    python -m braces_cli.evaluation.lm_eval_model run --model braces --tasks triviaqa
        --model_args pretrained=M,adapter=out,attribute=positive,s=3

The package declares the model in the entry points `lm_eval.models`; for versions of lm-eval that do not read them
(0.4.13), this module registers it and then calls lm-eval's main function.
"""

import sys
from contextlib import ExitStack
from typing import Any

import torch
from lm_eval.api.registry import model_registry
from lm_eval.models.huggingface import HFLM

from braces_cli.core.adapter.model import open_session
from braces_cli.core.attributes.hooks import steered
from braces_cli.core.attributes.lookup import find_attribute
from braces_cli.core.attributes.options import AttributeSettings
from braces_cli.core.config import build, options_of
from braces_cli.core.errors import BracesError
from braces_cli.core.options import LoadOptions
from braces_cli.core.text import error_text
from braces_cli.evaluation.systems import attached, find_eval_adapter, resolve_base


class BracesLM(HFLM):
    """HFLM on a base with an adapter of braces or PEFT.

    Args:
        pretrained: base, folder or hub id; by default the base of the adapter.
        adapter: folder or hub id.
        attribute: name of an attribute to steer by, or a list of names.
        s: strength, or a list with one for each attribute.
        attributes: folder with attribute files.
        kwargs: options of loading (`device`, `dtype`, `quantize`, ...), and arguments of HFLM.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        adapter: str | None = None,
        attribute: str | list[str] | None = None,
        s: float | list[float] = 1.0,
        attributes: str | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        names = [attribute] if isinstance(attribute, str) else list(attribute or ())
        values = list(s) if isinstance(s, (list, tuple)) else [s] * len(names)
        steering = build(AttributeSettings, {"attribute": names, "s": values, "attributes": attributes})
        adapters = [] if adapter is None else [find_eval_adapter(adapter)]
        pretrained, revision = resolve_base(pretrained, revision, adapters)
        load = {name: value for name in options_of(LoadOptions) if (value := kwargs.pop(name, None)) is not None}
        # lm-eval's command passes `cuda:0` if the user names no device.
        if str(load.get("device")).startswith("cuda") and not torch.cuda.is_available():
            load.pop("device")
        options = LoadOptions(**load, revision=revision)
        stored = adapters[0].stored if adapters else None
        session = open_session(
            pretrained, None, options, template=None if stored is None else stored.config.chat_template
        )
        # Adapter and steering stay active as long as the model exists.
        self._contexts = ExitStack()
        self._contexts.enter_context(attached(session, adapters[0] if adapters else None))
        terms = [(find_attribute(session, name, steering.attributes), s) for name, s in steering.strengths.items()]
        self._contexts.enter_context(steered(session, terms))
        # Model and tokenizer are loaded: no further code can come with them.
        super().__init__(
            pretrained=session.base.model, tokenizer=session.base.tokenizer, trust_remote_code=False, **kwargs
        )
        # For lm-eval's record of the model.
        self.pretrained, self.revision = session.base.name, session.base.revision or "main"


def register() -> None:
    """Register the model by name, because the class is a different object if this file runs as a script."""
    if "braces" not in model_registry:
        model_registry.register("braces", target="braces_cli.evaluation.lm_eval_model:BracesLM")


def main() -> None:
    """Run lm-eval's command line with `--model braces`."""
    from lm_eval.__main__ import cli_evaluate

    register()
    try:
        cli_evaluate()
    except BracesError as error:
        print(error_text(error.message, error.where, error.hint), file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
