"""Attach relevance modules to a model, detach them, and open a base model with its adapter."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from braces_cli.core.adapter.files import AdapterConfig, StoredAdapter, find_adapter, write_adapter
from braces_cli.core.adapter.layer import ConditionMLP, Read, RelevanceModule
from braces_cli.core.distributed import full_tensor
from braces_cli.core.errors import ConfigError, ModelError, logger
from braces_cli.core.files import path_exists, user_path
from braces_cli.core.models.ffn import FFN, Experts, MixtureFFN, choose_ffns, expert_outputs, find_ffns, routing
from braces_cli.core.models.hub import EMBEDDED, note_default
from braces_cli.core.models.identity import check_same_base
from braces_cli.core.models.load import Base, load_base, load_shape
from braces_cli.core.models.structure import hooks_changed
from braces_cli.core.models.tokenize import choose_template, end_tokens
from braces_cli.core.options import LoadOptions


class Adapter:
    """Relevance modules attached to a model: `adapted_ffns` pairs each FFN with its module, in layer order.

    The modules are children named `relevance` of the FFN (of the decoder layer if it has no FFN module), so that
    parameter names of the base do not change. The parameters of the base are frozen until `unfreeze_base`.
    """

    def __init__(self, model: nn.Module, adapted_ffns: list[tuple[FFN | MixtureFFN, RelevanceModule]]) -> None:
        self.model = model
        self.adapted_ffns = adapted_ffns
        # Taken before FSDP2 shards the weights.
        self._samples = {f"layers.{ffn.layer}.base_samples": ffn.samples for ffn, _ in adapted_ffns}
        # Maps pooled states to h_c, if attributes are trained.
        self.mlp: ConditionMLP | None = None
        self._frozen: list[nn.Parameter] = []
        self.freeze_base()
        self._handles: list[RemovableHandle] = []
        try:
            for ffn, adapter_layer in adapted_ffns:
                ffn.host.add_module("relevance", adapter_layer)
                adapter_layer.cache_gram(isinstance(ffn, FFN))
                for part in ffn.parts:
                    self._handles += hook_ffn(part, adapter_layer)
            hooks_changed(model)
        except BaseException:
            self.detach()
            raise

    def freeze_base(self) -> None:
        """Freeze every parameter that is not frozen, for training; the adapter's own are trained or added later."""
        self._frozen += [p for p in self.model.parameters() if p.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)

    def unfreeze_base(self) -> None:
        """Restore the base's `requires_grad` flags, for inference.

        torch multiplies the last of several tokens with a frozen head as a batch of matrices: it copies the whole head
        for each row.
        """
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []

    @property
    def layers(self) -> list[int]:
        return [ffn.layer for ffn, _ in self.adapted_ffns]

    @property
    def rank(self) -> int:
        return self.adapted_ffns[0][1].rank

    @property
    def relevance_to(self) -> str:
        """See `RelevanceModule`."""
        return self.adapted_ffns[0][1].relevance_to

    @property
    def scales(self) -> list[float]:
        """c of each layer."""
        return [adapter_layer.scale for _, adapter_layer in self.adapted_ffns]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(`layers.{i}.weight` or another name, parameter) of every relevance module."""
        for ffn, adapter_layer in self.adapted_ffns:
            for name, parameter in adapter_layer.named_parameters(recurse=False):
                yield f"layers.{ffn.layer}.{name}", parameter

    def add_mlp(self, seed: int = 0) -> ConditionMLP:
        """Add a new MLP of attributes, with its first layer drawn from `seed`."""
        ffn, adapter_layer = self.adapted_ffns[0]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            mlp = ConditionMLP(ffn.hidden_size).to(adapter_layer.weight.device)
        # A child of the model, so that code that moves, wraps or counts the model's parameters includes it.
        self.model.add_module("adapter_condition", mlp)
        self.mlp = mlp
        return mlp

    def states(self, pooled: Tensor, read: Read = full_tensor) -> Tensor:
        """h_c of pooled states p, (..., d) -> (..., d) in float32, on the device of the MLP."""
        if self.mlp is None:
            return pooled
        parameters = {name: read(parameter) for name, parameter in self.mlp.named_parameters()}
        # With a device map the layer of the states can be on another device.
        pooled = pooled.to(next(iter(parameters.values())).device)
        states: Tensor = torch.func.functional_call(self.mlp, parameters, (pooled,))
        return states

    def condition(self, states: Tensor | None, strengths: Tensor | None = None, read: Read = full_tensor) -> None:
        """Set `s r_c` of the next forward passes, for each example; None removes it.

        Args:
            states: h_c of n attributes at each adapted FFN, (n, FFNs, d), with gradients if they are trained.
            strengths: s of each attribute for each example, (batch, n), or for each token, (batch, tokens, n).
            read: reads a parameter, gathered if it is sharded.
        """
        for index, (_, adapter_layer) in enumerate(self.adapted_ffns):
            if states is None or strengths is None:
                adapter_layer.shift = None
                continue
            ranked = states[:, index].to(adapter_layer.weight) @ adapter_layer.projection(read).mT  # (n, d_r)
            shift = strengths.to(ranked) @ ranked
            adapter_layer.shift = shift.unsqueeze(1) if shift.ndim == 2 else shift

    def detach(self) -> nn.Module:
        """Remove all modules and hooks, and return the base model with its original `requires_grad` flags."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for ffn, adapter_layer in self.adapted_ffns:
            if "relevance" in ffn.host._modules:
                del ffn.host.relevance
            adapter_layer.release()
        if self.mlp is not None:
            del self.model.adapter_condition
            self.mlp = None
        self.unfreeze_base()
        return self.model

    @contextmanager
    def disabled(self) -> Iterator[nn.Module]:
        """The base model without the adapter, bit-identical, inside the `with` block."""
        before = [adapter_layer.enabled for _, adapter_layer in self.adapted_ffns]
        try:
            for _, adapter_layer in self.adapted_ffns:
                adapter_layer.enabled = False
            yield self.model
        finally:
            for (_, adapter_layer), enabled in zip(self.adapted_ffns, before, strict=True):
                adapter_layer.enabled = enabled

    def tensors(self, in_place: bool = True) -> dict[str, Tensor]:
        """Tensors of the adapter file.

        `layers.{i}.*` as in `relevance_shapes`, `layers.{i}.base_samples` and, if trained, `condition.*`.

        Args:
            in_place: set the weights to the projections in the file. Use False during training, which must continue
                from the unrounded weights, and for sharded parameters, where this is a collective call.
        """
        out = dict(self._samples)
        for ffn, adapter_layer in self.adapted_ffns:
            out |= {f"layers.{ffn.layer}.{name}": t for name, t in adapter_layer.tensors(in_place).items()}
        if self.mlp is not None:
            out.update({f"condition.{name}": full_tensor(tensor) for name, tensor in self.mlp.state_dict().items()})
        return out

    def save(self, folder: Path, config: AdapterConfig, card: str) -> None:
        """Write the adapter folder, with the relevance and the scales of this adapter in its config."""
        config = replace(config, relevance_to=self.relevance_to, relevance_scale=self.scales)
        write_adapter(folder, self.tensors(), config, card)


def hook_ffn(part: FFN | Experts, adapter_layer: Any) -> list[RemovableHandle]:
    """Let `adapter_layer`, a `RelevanceModule` or an object with its methods, change the output of an FFN."""
    to_output = adapter_layer.relevance_to == "output"
    if isinstance(part, Experts):

        def experts_hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
            if not adapter_layer.enabled:
                return None
            values = part.value_matrix()
            if part.presorted:
                return adapter_layer.by_expert(output, output if to_output else args[0], values)
            h, index, p = routing(args, kwargs)
            query = expert_outputs(module, args, kwargs, index) if to_output else h.unsqueeze(1)
            return adapter_layer.routed(output, query, index, p, values)

        return [part.module.register_forward_hook(experts_hook, with_kwargs=True)]
    if to_output:

        def value_hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            return adapter_layer(output, output, part.values()) if adapter_layer.enabled else None

        # On the projection, not on the host: a steering vector is added to what this hook returns.
        return [part.value.register_forward_hook(value_hook)]
    if part.is_host_output:

        def host_hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
            if not adapter_layer.enabled:
                return None
            return adapter_layer(output, args[0] if args else next(iter(kwargs.values())), part.values())

        return [part.host.register_forward_hook(host_hook, with_kwargs=True)]

    # A list, not an attribute of the module: inputs must not outlive a pass or be copied with the module.
    inputs: list[Tensor] = []

    def input_hook(module: nn.Module, args: tuple) -> None:
        inputs[:] = args[:1] if adapter_layer.enabled else []

    def output_hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        return adapter_layer(output, inputs.pop(), part.values()) if adapter_layer.enabled else None

    return [part.keys[0].register_forward_pre_hook(input_hook), part.value.register_forward_hook(output_hook)]


def attach(
    model: nn.Module,
    rank: int,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    scales: Sequence[float] | None = None,
    ffns: Sequence[FFN | MixtureFFN] | None = None,
    relevance_to: str = "input",
) -> Adapter:
    """Attach a new relevance module to every FFN of `model`, or to those of `layers`, with gates near 0.

    Args:
        scales: c of each layer, see `core.adapter.scale`; None is 1 everywhere.
        ffns: FFNs of `model`, if they are known.
        relevance_to: see `RelevanceModule`.

    Raises:
        ConfigError: rank below 1 or above the hidden size, or a layer without an FFN.
        ModelError: the model has no FFN, or an adapter.
    """
    ffns = find_ffns(model) if ffns is None else ffns
    if any("relevance" in ffn.host._modules for ffn in ffns):
        raise ModelError("the model already has an adapter", hint="Detach it first.")
    generator = torch.Generator().manual_seed(seed)
    adapted_ffns = []
    for index, ffn in enumerate(choose_ffns(ffns, rank, layers)):
        scale = 1.0 if scales is None else scales[index]
        device = ffn.parts[0].values().device
        adapted_ffns.append((ffn, RelevanceModule(rank, ffn.hidden_size, device, generator, scale, relevance_to)))
    return Adapter(model, adapted_ffns)


def check_base(stored: StoredAdapter, base: Base) -> None:
    """Raise ModelError if an adapter was trained on another base."""
    config = stored.config
    samples = {layer: stored.tensors[f"layers.{layer}.base_samples"] for layer in config.layers}
    hint = f"It needs {config.base_model_name_or_path}."
    check_same_base("this adapter was trained on", config.base, samples, base, str(stored.folder), hint)


def attach_stored(base: Base, stored: StoredAdapter) -> Adapter:
    """Attach a stored adapter to the base's model, for inference: the adapter is frozen, the base is not.

    Raises:
        ModelError: the folder is damaged, or belongs to another base.
    """
    config, tensors = stored.config, stored.tensors
    check_base(stored, base)
    try:
        adapter = attach(
            base.model,
            config.r,
            config.layers,
            scales=config.relevance_scale,
            ffns=base.ffns,
            relevance_to=config.relevance_to,
        )
    except ConfigError as error:  # the adapter is wrong, not an option
        raise ModelError(error.message, where=str(stored.folder), hint=error.hint) from error
    for ffn, adapter_layer in adapter.adapted_ffns:
        with torch.no_grad():
            for name, parameter in adapter_layer.stored.items():
                parameter.copy_(tensors[f"layers.{ffn.layer}.{name}"])
        adapter_layer.set_exact()
        adapter_layer.requires_grad_(False)
    if config.attributes:
        prefix = "condition."
        mlp = adapter.add_mlp().requires_grad_(False)
        mlp.load_state_dict({name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)})
    adapter.unfreeze_base()
    return adapter


@dataclass
class Session:
    """A loaded base, with or without an adapter.

    Attributes:
        adapter: the attached adapter.
        stored: the files of the adapter; None without an adapter, and in training.
    """

    base: Base
    adapter: Adapter | None = None
    stored: StoredAdapter | None = None

    def __post_init__(self) -> None:
        # Before any PEFT baseline replaces modules of the model.
        self.ffns = self.base.ffns
        self._generation: Any = getattr(self.base.model, "generation_config", None)

    @property
    def config(self) -> AdapterConfig | None:
        """Config of the stored adapter."""
        return None if self.stored is None else self.stored.config

    @property
    def folder(self) -> Path | None:
        """Folder of the stored adapter."""
        return None if self.stored is None else self.stored.folder

    @property
    def turn_ends(self) -> list[str]:
        """Tokens and texts that end an assistant's turn of the stored adapter."""
        return [] if self.config is None else self.config.end_of_turn

    def add_adapter(self, stored: StoredAdapter) -> Adapter:
        """Attach a stored adapter; detaches the current one."""
        self.remove_adapter()
        self.adapter = attach_stored(self.base, stored)
        self.stored = stored
        if self.turn_ends:
            model, own = self.base.model, copy.copy(self._generation)
            own.eos_token_id = end_tokens(model, self.base.tokenizer, self.turn_ends) or None
            model.generation_config = own
        trained, here = stored.config.tokenizer, self.base.tokenizer_hashes
        for part in sorted(key for key in trained if trained[key] != here.get(key)):
            logger.warning("%s: trained with another %s than the base has now", stored.name, part.replace("_", " "))
        return self.adapter

    @contextmanager
    def bare(self) -> Iterator[None]:
        """Disable the adapter, if there is one, inside the `with` block."""
        with nullcontext() if self.adapter is None else self.adapter.disabled():
            yield

    def remove_adapter(self) -> None:
        """Detach the adapter, if there is one."""
        if self.adapter is not None:
            self.adapter.detach()
            self.base.model.generation_config = self._generation
        self.adapter = self.stored = None


@contextmanager
def attached(session: Session, stored: StoredAdapter) -> Iterator[Adapter]:
    """A stored adapter on the session's base inside the `with` block."""
    try:
        yield session.add_adapter(stored)
    finally:
        session.remove_adapter()


def base_name(model: str | None, adapter: StoredAdapter | None) -> str:
    """Name of the base: `model`, else that in the adapter's config, else the embedded model, with a note on stderr."""
    if model is not None:
        return model
    if adapter is not None:
        return stored_base(adapter.config.base_model_name_or_path, adapter.name)
    note_default()
    return EMBEDDED


def stored_base(base: str, adapter: str) -> str:
    """Return the base that the config of an adapter names; raises ModelError if it is a path that does not exist."""
    if base.startswith(("/", ".", "~")) and not path_exists(user_path(base)):
        hint = "Name the base with --model, if it was moved."
        raise ModelError(f"the base of this adapter does not exist: {base}", where=adapter, hint=hint)
    return base


def open_session(
    model: str | None,
    adapter: str | StoredAdapter | None,
    options: LoadOptions,
    tokenizer: Any = None,
    template: str | None = None,
) -> Session:
    """Load a base, and attach an adapter if one is given.

    Args:
        tokenizer: tokenizer of the base, if loaded already, with its chat template.
        template: chat template of adapters that are attached later.

    Raises:
        ConfigError: the device is not available.
        ModelError: base or adapter cannot be loaded, or they do not fit.
    """
    # Before the weights of the base: an invalid adapter must fail at once.
    stored = find_adapter(adapter) if isinstance(adapter, str) else adapter
    if stored is not None and model is None and options.revision is None and stored.config.revision is not None:
        options = replace(options, revision=stored.config.revision)
    base = load_base(base_name(model, stored), options, tokenizer)
    session = Session(base)
    if tokenizer is None:
        choose_template(base.tokenizer, options, template if stored is None else stored.config.chat_template)
    if stored is not None:
        session.add_adapter(stored)
    return session


def open_shape(settings: Any) -> tuple[Base, StoredAdapter | None]:
    """Return a base without weights and tokenizer, and the adapter, if one is given; only their sizes are compared.

    Args:
        settings: `AdapterSettings`, or the part of them that is about no weights.

    Raises:
        ModelError: base or adapter cannot be loaded, or they do not fit.
    """
    stored = None if settings.adapter is None else find_adapter(settings.adapter)
    name, revision = base_name(settings.model, stored), settings.revision
    if stored is not None and settings.model is None:
        revision = revision or stored.config.revision
    shape = load_shape(name, revision=revision, trust_remote_code=settings.trust_remote_code)
    base = Base(shape, None, name, revision, allow_other=settings.allow_other_base)
    if stored is not None:
        check_base(stored, base)
    return base, stored
