"""transformers' Trainer with exact data order, a stop before a bad step, and atomic checkpoints."""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import Trainer, TrainerControl, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME

from titans.errors import UserError
from titans.models import TitansForCausalLM
from titans.nn.cuda_graph import can_record
from titans.nn.metrics import MemoryMetrics, WriteShares
from titans.training.answers import right_answers, select_answers
from titans.training.checkpoints import (
    RECIPE_NAME,
    SKIPPED,
    checkpoint_path,
    checkpoints_in,
    publish,
    remove_checkpoint,
    remove_leftovers,
    staging_folder,
)
from titans.training.graph import GraphedStep
from titans.training.recipe import TrainingSettings


class NonFiniteError(RuntimeError):
    """The loss or the gradient's norm is NaN or infinite; raised before the optimiser could spread it."""


class ShuffledForever(Sampler[int]):
    """``total`` indices into ``length`` sequences: one seeded permutation after another.

    The whole run is one pass over this sampler, so the position in the data is the step times the batch size,
    a resumed run skips to it, and a run that is later made longer keeps the order of its first part.
    """

    def __init__(self, length: int, total: int, seed: int):
        self._length, self._total, self._seed = length, total, seed

    def __len__(self) -> int:
        return self._total

    def __iter__(self) -> Iterator[int]:
        for start in range(0, self._total, self._length):
            # A generator of its own: the order must not depend on what else drew random numbers.
            generator = torch.Generator().manual_seed(self._seed + start // self._length)
            order = torch.randperm(self._length, generator=generator).tolist()
            yield from order[: self._total - start]


def _ramp(progress: float) -> float:
    """0 in the first quarter of a run, 1 in its second half: first a model must learn what to write."""
    return min(max(4 * progress - 1, 0.0), 1.0)


def training_arguments(settings: TrainingSettings, out: Path, *, evaluate: bool) -> TrainingArguments:
    """Transformers' arguments for our settings, its own logs and progress bars switched off."""
    return TrainingArguments(
        output_dir=str(out),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": settings.min_learning_rate_ratio},
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        activation_checkpointing=settings.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
        seed=settings.seed,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=settings.eval_every,
        save_steps=settings.save_every,
        dataloader_num_workers=settings.num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        prediction_loss_only=True,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would hide what NonFiniteError is there for
        disable_tqdm=True,
        report_to="none",
    )


class TitansTrainer(Trainer):
    """The loop is transformers'; this class changes four things.

    1. Data order: ``ShuffledForever``, or the data's own.
    2. A loss or gradient norm that is not finite raises ``NonFiniteError`` before the optimiser; so many
       gradients as the settings say are left out instead.
    3. A checkpoint is written beside its final place and renamed when it is whole; the last ``keep`` stay.
       With it go ``provenance`` and the number of steps left out.
    4. The validation loss is a mean over tokens, with the share of right answers where there are any, and
       logs are tokens and seconds, not epochs and samples.

    Args:
        settings: the recipe's training part.
        out: the output folder.
        train_dataset, eval_dataset: map-style; their items are what ``data_collator`` makes batches of.
        provenance: plain values to store with every checkpoint (recipe.json).
        skipped: steps that an earlier part of this run has left out.
        in_order: the items of ``train_dataset``, one for each forward pass, come in their order.
        answers: validation counts the labels that are the likeliest tokens, and the runs of labels (answers)
            that are so from the first to the last.
        memory_metrics_every: steps between measurements of the memory's norms and gates; 0: never.
    """

    control: TrainerControl  # declared here because transformers leaves its type to be inferred

    def __init__(
        self,
        model: TitansForCausalLM,
        *,
        settings: TrainingSettings,
        out: Path,
        train_dataset: Dataset[Any],
        eval_dataset: Dataset[Any] | None,
        provenance: dict[str, Any],
        skipped: int = 0,
        in_order: bool = False,
        answers: bool = False,
        memory_metrics_every: int = 0,
        **others: Any,
    ):
        self._settings = settings
        self._out = out
        self._provenance = provenance
        self._in_order = in_order
        self._answers = answers
        self._last_loss: torch.Tensor | None = None
        self._memory_metrics_every = memory_metrics_every
        self._memory_metrics: dict[str, float] = {}
        self._shares: dict[str, torch.Tensor] = {}  # of writing, that have a price
        self._skipped = skipped
        self._clock = time.perf_counter()
        self._tokens_at_clock = 0
        self._staging: Path | None = None
        self._graphs: GraphedStep | None = None
        if settings.compile:
            model.compile_blocks()
        super().__init__(
            model=model,
            args=training_arguments(settings, out, evaluate=eval_dataset is not None),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            **others,
        )
        self._price = torch.zeros((), device=self.args.device)  # of writing, at this step
        if settings.cuda_graph and can_record(self.args.device):
            if self.args.world_size > 1:
                raise UserError("training.cuda_graph: expected one process, got several")
            self._graphs = GraphedStep(self._recordable_step, self.model.parameters())

    # Data

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int]:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        settings = self._settings
        if self._in_order:
            return SequentialSampler(dataset)
        per_step = settings.batch_size * settings.gradient_accumulation_steps * self.args.world_size
        return ShuffledForever(len(dataset), settings.steps * per_step, settings.seed)

    # Optimisation

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Weight decay falls on the weights of linear layers and embeddings, and on nothing else.

        Not on biases, norm gains, convolution filters and persistent tokens, which are few and have a scale
        to keep; nor on the initial memory and the gates, where a pull towards zero would be a pull towards a
        dead memory.
        """
        return [
            f"{name}.weight" if name else "weight"
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | nn.Embedding)
        ]

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        self.state.num_input_tokens_seen += inputs["input_ids"].numel() * self.args.world_size
        if penalty := self._settings.write_penalty:
            self._price.fill_(penalty * _ramp(self.state.global_step / self._settings.steps))
        every = self._memory_metrics_every
        due = every > 0 and (self.state.global_step + 1) % every == 0
        replayed = self._graphs is not None and not due and "cu_seqlens" not in inputs
        step = self._replayed_step if replayed else super().training_step
        with MemoryMetrics(model) if due else contextlib.nullcontext() as metrics:
            self._last_loss = step(model, inputs, num_items_in_batch)
        if metrics is not None:
            self._memory_metrics = {f"memory_{name}": value for name, value in metrics.means().items()}
        return self._last_loss

    def _replayed_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        """The same by a CUDA graph of all but what depends on how much is asked for."""
        assert self._graphs is not None
        model.train()
        inputs = self._prepare_inputs(inputs)
        if self._answers:
            inputs = self._with_answers(inputs, multiple=max(inputs["input_ids"].numel() // 4, 1))
        elif num_items_in_batch is not None:
            inputs["items"] = torch.as_tensor(num_items_in_batch, device=self.args.device)
        loss, *shares = self._graphs(inputs)
        self._shares = dict(zip(self._shares, shares, strict=True))
        return loss.clone()  # the Trainer keeps it beyond the next step

    def _recordable_step(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        loss = self.compute_loss(self.model_wrapped, inputs, num_items_in_batch=inputs.pop("items", None))
        return loss, *self._shares.values()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """In training: the loss on answers alone where there are answers, and what writing costs."""
        if return_outputs or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        worth = inputs.pop("worth", None)
        settings = self._settings
        priced = settings.write_penalty or settings.noise_penalty
        with WriteShares(model) if priced else contextlib.nullcontext() as shares:
            if self._answers and self.args.world_size == 1:  # several processes must go through the wrapper
                loss = self._answer_loss(self.accelerator.unwrap_model(model), self._with_answers(inputs))
            else:
                loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        if shares is not None:
            share = shares.mean()
            loss = loss + self._price * share
            self._shares = {"write_share": share.detach()}  # not the autograd graph with it
            if worth is not None:
                share = shares.of_noise(worth)
                loss = loss + settings.noise_penalty * share
                self._shares["noise_share"] = share.detach()
        return loss

    @staticmethod
    def _with_answers(inputs: dict[str, Any], multiple: int = 1) -> dict[str, Any]:
        """Places and targets of what is asked for in place of the labels, where they are not there yet."""
        if "places" in inputs:
            return inputs
        places, targets = select_answers(inputs["labels"], multiple)
        others = {name: tensor for name, tensor in inputs.items() if name != "labels"}
        return others | {"places": places, "targets": targets}

    def _answer_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """The model's loss without the logits of all the tokens that nothing is asked at."""
        with self.accelerator.autocast():
            hidden = model.model(input_ids=inputs["input_ids"]).last_hidden_state
            logits = model.lm_head(hidden.flatten(0, 1).index_select(0, inputs["places"]))
        return nn.functional.cross_entropy(logits.float(), inputs["targets"])

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Called once per step, after clipping and before the optimiser: the last moment to refuse."""
        norm = super()._get_grad_norm(model, grad_norm)
        assert self._last_loss is not None
        loss_value, norm_value = float(self._last_loss), float(norm)
        if math.isfinite(loss_value) and math.isfinite(norm_value):
            return norm
        if self._skipped == self._settings.max_skipped_steps or not math.isfinite(loss_value):
            raise NonFiniteError(
                f"step {self.state.global_step + 1}: loss {loss_value}, gradient norm {norm_value}; "
                "stopped before the optimiser"
            )
        self._skipped += 1
        model.zero_grad(set_to_none=True)  # the optimiser leaves parameters without gradient alone
        return norm

    # Evaluation

    @torch.no_grad()
    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Mean loss per predicted token, in nats, over the validation sequences."""
        model = self.model_wrapped
        was_training = model.training
        model.eval()
        total = torch.zeros(5, dtype=torch.float64, device=self.args.device)
        for inputs in self.get_eval_dataloader(eval_dataset):
            inputs = self._prepare_inputs(inputs)
            count = (inputs["labels"][..., 1:] != -100).sum()  # labels are shifted inside the model
            with self.compute_loss_context_manager():
                loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
            total[:2] += torch.stack([loss.detach().double() * count, count.double()])
            if self._answers:
                total[2:] += torch.stack(right_answers(outputs.logits, inputs["labels"]))
        total = self.accelerator.reduce(total)
        model.train(was_training)
        metrics = {f"{metric_key_prefix}_loss": (total[0] / total[1]).item()}
        if self._answers:
            metrics[f"{metric_key_prefix}_token_accuracy"] = (total[2] / total[1]).item()
            metrics[f"{metric_key_prefix}_answer_accuracy"] = (total[3] / total[4]).item()
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._restart_clock()
        return metrics

    # Figures

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Hand ``logs`` to the callbacks, with the tokens seen and the speed since the last call."""
        if "train_runtime" in logs:  # the Trainer's summary at the end: all of it stands in the log already
            return
        if "loss" in logs:
            seen = self.state.num_input_tokens_seen
            logs["tokens_seen"] = seen
            logs |= self._memory_metrics
            if self._skipped:
                logs[SKIPPED] = self._skipped
            logs |= {name: share.item() for name, share in self._shares.items()}
            self._memory_metrics = {}
            seconds = time.perf_counter() - self._clock
            logs["tokens_per_second"] = round((seen - self._tokens_at_clock) / seconds, 1)
            self._restart_clock()
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def _restart_clock(self) -> None:
        """The time of evaluations and checkpoints does not count as training."""
        self._clock = time.perf_counter()
        self._tokens_at_clock = self.state.num_input_tokens_seen

    # Checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or self._out)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step = self.state.global_step
        final = checkpoint_path(self._out, step)
        self._staging = staging_folder(self._out)
        config: Any = self.model.config
        if self.args.should_save:
            remove_leftovers(self._out)
            self._staging.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        try:
            config.use_cache = True  # the Trainer turned it off for training; whoever loads this wants it
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # each process writes its own random state
            if self.args.should_save:
                staged = checkpoint_path(self._staging, step)
                (staged / TRAINING_ARGS_NAME).unlink()  # a pickle; the recipe says the same
                described = json.dumps(self._provenance | {SKIPPED: self._skipped}, indent=1)
                (staged / RECIPE_NAME).write_text(described + "\n", encoding="utf-8")
                if final.exists():
                    remove_checkpoint(final)
                publish(staged, final)
                remove_leftovers(self._out)
                for old in checkpoints_in(self._out)[: -self._settings.keep]:
                    remove_checkpoint(old)
        finally:
            self._staging = None
            config.use_cache = False
        self.accelerator.wait_for_everyone()
        self._restart_clock()

    def save_now(self) -> None:
        """Save the state after the last finished step, unless that was done or the weights are not finite."""
        weights_fit = all(bool(torch.isfinite(p).all()) for p in self.model.parameters())
        if weights_fit and not checkpoint_path(self._out, self.state.global_step).exists():
            self._save_checkpoint(self.model_wrapped, trial=None)
