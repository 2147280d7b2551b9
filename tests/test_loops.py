"""Whoever has a loop keeps it: exact resume, and gradient accumulation as one big batch, with dropout on."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

import dropkit as dk
from dropkit.errors import OptionError
from dropkit.masks import address
from dropkit.training.checkpoint import Checkpoints

ROWS, FEATURES, BATCH, STEPS = 24, 6, 8, 6
SAME = {"rtol": 1e-12, "atol": 1e-12}


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, FEATURES, generator=generator, dtype=torch.float64)
    return x, x[:, :1].sin() + x[:, 1:2]


def network() -> nn.Module:
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Linear(FEATURES, 16), nn.ReLU(), dk.nn.Dropout(0.4),
        nn.Linear(16, 8), nn.Tanh(), dk.nn.Dropout(0.2), nn.Linear(8, 1),
    ).double()  # fmt: skip
    dk.nn.name_sites(model)
    return model


class EpochOrder(Sampler[int]):
    """An order of the rows that the number of the epoch decides alone."""

    def __init__(self, rows: int) -> None:
        self.rows, self.epoch = rows, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        return iter(torch.randperm(self.rows, generator=torch.Generator().manual_seed(self.epoch)).tolist())

    def __len__(self) -> int:
        return self.rows


def loader(batch: int = BATCH) -> DataLoader:
    x, y = data()
    return DataLoader(TensorDataset(torch.arange(ROWS), x, y), batch_size=batch, sampler=EpochOrder(ROWS))


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], **SAME)


def moved(model: dict[str, torch.Tensor], fresh: nn.Module) -> None:
    assert not any(torch.equal(tensor, dict(fresh.state_dict())[name]) for name, tensor in model.items())


def plain(steps: int, start: int = 0, state: dict | None = None, micro: int = 1) -> tuple[nn.Module, dict]:
    """The loop that everybody has."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    batches = loader()
    step = 0
    for epoch in range(10):
        batches.sampler.set_epoch(epoch)
        for rows, x, y in batches:
            if start <= step < steps:
                for part in range(micro):
                    ids, px, py = rows[part::micro], x[part::micro], y[part::micro]
                    with dk.masks(seed=3, step=step, samples=ids):
                        loss = nn.functional.mse_loss(model(px), py) / micro
                    loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            step += 1
    return model, copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})


def test_plain_torch_resumes_bit_for_bit():
    whole, _ = plain(STEPS)
    moved(weights(whole), network())
    _, half = plain(3)
    rest, _ = plain(STEPS, start=3, state=half)
    assert_equal(weights(rest), weights(whole))


@pytest.mark.parametrize("micro", [2, 4])
def test_plain_torch_accumulates_to_the_big_batch(micro):
    assert_close(weights(plain(STEPS, micro=micro)[0]), weights(plain(STEPS)[0]))


# Lightning


def quietly(run, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the packages' own
        return run(*args, **kwargs)


def lightning_run(folder, steps=STEPS, batch=BATCH, accumulate=1, resume=None):
    """Train, save at the end of each epoch; gives the weights."""
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    from dropkit.engines.lightning import Masks

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def training_step(self, batch, batch_idx):
            _, x, y = batch
            return nn.functional.mse_loss(self.net(x), y)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.05)

    module = Module()
    saving = ModelCheckpoint(folder, filename="{step}", every_n_epochs=1, save_top_k=-1)
    trainer = lightning.Trainer(
        max_epochs=steps // 3, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, accumulate_grad_batches=accumulate, callbacks=[Masks(seed=3, rows=0), saving],
    )  # fmt: skip
    quietly(trainer.fit, module, loader(batch), ckpt_path=resume, weights_only=True)
    return weights(module.net)


def test_lightning_resumes_bit_for_bit_and_is_the_plain_loop(tmp_path):
    whole = lightning_run(tmp_path / "whole")
    assert_equal(weights(plain(STEPS)[0]), whole)
    lightning_run(tmp_path / "half", steps=3)
    assert_equal(lightning_run(tmp_path / "rest", resume=tmp_path / "half/step=3.ckpt"), whole)


def test_lightning_accumulates_to_the_big_batch(tmp_path):
    assert_close(lightning_run(tmp_path, batch=BATCH // 2, accumulate=2), lightning_run(tmp_path))


def test_lightning_without_row_ids_is_told_and_a_batch_that_fails_closes_its_context():
    import lightning

    from dropkit.engines.lightning import Masks

    class Failing(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def training_step(self, batch, batch_idx):
            assert address.current().samples.tolist() == batch[0].tolist()
            raise ZeroDivisionError

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    for rows, error in (("ids", OptionError), (9, OptionError), (lambda batch: batch[0], ZeroDivisionError)):
        trainer = lightning.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
            enable_model_summary=False, callbacks=[Masks(rows=rows)],
        )  # fmt: skip
        with pytest.raises(error):
            quietly(trainer.fit, Failing(), loader())
        assert address.current() is None


# transformers


class Words(Dataset):
    """Sequences of word numbers, with a class and a row id each."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(4)
        self.ids = torch.randint(0, 50, (ROWS, 7), generator=generator)

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        words = self.ids[row]
        return {"input_ids": words, "labels": (words.sum() % 3), "row": torch.tensor(row)}


def bert() -> nn.Module:
    import transformers

    torch.manual_seed(5)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, num_labels=3, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2,
    )  # fmt: skip
    model = dk.convert(transformers.BertForSequenceClassification(config).double()).model
    model.accepts_loss_kwargs = (
        False  # the trainer takes it to average over micro-batches, which this head does not
    )
    return model


def trainer_of(folder, batch=BATCH, accumulate=1, model=None, seed=3, unused=False):
    import transformers

    from dropkit.engines.transformers import Masks

    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, learning_rate=0.01, save_steps=2,
        per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
        logging_strategy="no", report_to=[], use_cpu=True, seed=7, disable_tqdm=True,
        remove_unused_columns=unused,
    )  # fmt: skip
    return transformers.Trainer(
        model or bert(), arguments, train_dataset=Words(), eval_dataset=Words(), callbacks=[Masks(seed=seed)]
    )


def test_transformers_resumes_bit_for_bit(tmp_path):
    whole = quietly(trainer_of, tmp_path)
    quietly(whole.train)
    moved_at_all = [
        not torch.equal(a, b) for a, b in zip(bert().parameters(), whole.model.parameters(), strict=True)
    ]
    assert any(moved_at_all)
    rest = quietly(trainer_of, tmp_path)
    quietly(rest.train, resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_equal(weights(rest.model), weights(whole.model))
    assert rest.evaluate()["eval_loss"] == whole.evaluate()["eval_loss"]  # row ids do not reach the model


def test_transformers_accumulates_to_the_big_batch(tmp_path):
    big = quietly(trainer_of, tmp_path / "big")
    quietly(big.train)
    small = quietly(trainer_of, tmp_path / "small", batch=BATCH // 4, accumulate=4)
    quietly(small.train)
    assert_close(weights(small.model), weights(big.model))
    other = quietly(trainer_of, tmp_path / "other", seed=4)
    quietly(other.train)
    assert not torch.allclose(other.model.classifier.weight, big.model.classifier.weight)


def test_transformers_opens_a_context_for_each_forward_pass_in_training_alone(tmp_path):
    trainer = quietly(trainer_of, tmp_path, batch=BATCH // 2, accumulate=2)
    seen = []

    def look(module, args):
        context = address.current()
        seen.append(context and (context.seed, context.step, tuple(context.samples.tolist())))

    trainer.model.classifier.register_forward_pre_hook(look)
    quietly(trainer.train)
    assert [step for _, step, _ in seen] == [step for step in range(STEPS) for _ in range(2)]
    assert {seed for seed, _, _ in seen} == {3}
    for epoch in (seen[: len(seen) // 2], seen[len(seen) // 2 :]):
        assert sorted(row for _, _, rows in epoch for row in rows) == list(range(ROWS))
    seen.clear()
    trainer.evaluate()
    assert seen
    assert set(seen) == {None}
    next(callback for callback in trainer.callback_handler.callbacks if hasattr(callback, "remove")).remove()
    assert not trainer.model._forward_pre_hooks


def test_transformers_without_row_ids_is_told(tmp_path):
    trainer = quietly(trainer_of, tmp_path, unused=True)
    with pytest.raises(OptionError, match="remove_unused_columns=False"):
        quietly(trainer.train)
    assert address.current() is None


# skorch


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x, row):
        return self.body(x)


def skorch_net(accumulate: int = 1, **options):
    from skorch import NeuralNetRegressor

    class Masked(NeuralNetRegressor):
        """One context a batch; optimizer steps are counted in the history, which is saved and loaded with the rest."""

        def train_step_single(self, batch, **fit_params):
            done = (
                sum(len(epoch["batches"]) for epoch in self.history) - 1
            )  # this batch has its place already
            with dk.masks(seed=3, step=done // accumulate, samples=batch[0]["row"]):
                return super().train_step_single(batch, **fit_params)

        def get_loss(self, y_pred, y_true, *args, **kwargs):
            return super().get_loss(y_pred, y_true, *args, **kwargs) / accumulate

        def train_step(self, batch, **fit_params):
            if accumulate == 1:
                return super().train_step(batch, **fit_params)
            first = sum(len(epoch["batches"]) for epoch in self.history) - 1
            found = self.train_step_single(batch, **fit_params)
            if (first + 1) % accumulate == 0:
                self.optimizer_.step()
                self.optimizer_.zero_grad()
            return found

    return Masked(
        Net, optimizer=torch.optim.Adam, lr=0.05, batch_size=BATCH // accumulate, train_split=None, verbose=0,
        iterator_train__shuffle=False, callbacks__print_log=None, **options,
    )  # fmt: skip


def skorch_data():
    x, y = data()
    return {"x": x.numpy(), "row": torch.arange(ROWS).numpy()}, y.numpy()


def test_skorch_resumes_bit_for_bit(tmp_path):
    whole = skorch_net(max_epochs=2).fit(*skorch_data())
    half = skorch_net(max_epochs=1).fit(*skorch_data())
    files = {f"f_{part}": str(tmp_path / part) for part in ("params", "optimizer", "history")}
    half.save_params(**files)
    rest = skorch_net(max_epochs=1).initialize()
    rest.load_params(**files)
    rest.partial_fit(*skorch_data())
    assert_equal(weights(rest.module_), weights(whole.module_))
    assert not torch.equal(half.module_.body[0].weight, whole.module_.body[0].weight)


def test_skorch_accumulates_to_the_big_batch():
    big = skorch_net(max_epochs=2).fit(*skorch_data())
    assert_close(
        weights(skorch_net(accumulate=2, max_epochs=2).fit(*skorch_data()).module_), weights(big.module_)
    )


# accelerate


def accelerate_run(folder, steps=STEPS, micro=1, resume=False):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=micro)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    model, optimizer, batches = accelerator.prepare(model, optimizer, loader(BATCH // micro))
    done = Checkpoints(folder, of={"lr": 0.05})
    start = done.restore(model=model, optimizer=optimizer) if resume else 0
    step = 0
    for epoch in range(steps // 3):
        batches.set_epoch(epoch)
        for rows, x, y in batches:
            if step >= start * micro:
                with accelerator.accumulate(model), dk.masks(seed=3, step=step // micro, samples=rows):
                    accelerator.backward(nn.functional.mse_loss(model(x), y))
                    optimizer.step()
                    optimizer.zero_grad()
            step += 1
    done.save(steps, model=model, optimizer=optimizer)
    return weights(model)


def test_accelerate_resumes_bit_for_bit_and_is_the_plain_loop(tmp_path):
    whole = accelerate_run(tmp_path / "whole")
    assert_equal(weights(plain(STEPS)[0]), whole)
    accelerate_run(tmp_path / "run", steps=3)
    assert_equal(accelerate_run(tmp_path / "run", resume=True), whole)


def test_accelerate_accumulates_to_the_big_batch(tmp_path):
    assert_close(accelerate_run(tmp_path / "small", micro=2), accelerate_run(tmp_path / "big"))
