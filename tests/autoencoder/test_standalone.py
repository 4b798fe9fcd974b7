"""A trained model is usable where Ray, MLflow, pandas and pyarrow are not installed."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from sane_ray.autoencoder.model import SANE
from sane_ray.config import AutoencoderConfig
from sane_ray.tokens.normalization import LayerStatistics, fit
from sane_ray.tokens.tokenizer import build_layer_table, tokenize

ABSENT = ("ray", "mlflow", "pyarrow", "pandas", "sklearn", "optuna", "jsonargparse", "matplotlib")

SCRIPT = """
import sys
absent = sys.argv[3].split(",")
for name in absent:
    sys.modules[name] = None  # importing it now raises ImportError

import torch
from safetensors.torch import load_file
from sane_ray import SANE

model = SANE.from_pretrained(sys.argv[1])
network = load_file(sys.argv[2])
z = model.encode_model(network)
decoded = model.decode_model(z, network)
assert {key: value.shape for key, value in decoded.items()} == {key: value.shape for key, value in network.items()}
loaded = {name.partition(".")[0] for name, module in sys.modules.items() if module is not None}
assert not loaded & set(absent), loaded & set(absent)
print(z.double().sum().item())
"""


def test_a_model_reads_and_writes_networks_without_ray(parity, tmp_path):
    network = load_file(parity / "cnn_a.safetensors")
    table = build_layer_table(network)
    normalization = fit(LayerStatistics().update(tokenize(network, table), table), "standardize")
    architecture = {"table": table.to_dict(), "normalization": normalization.to_dict()}
    config = AutoencoderConfig(
        token_size=table.token_size, window=16, d_model=16, layers=1, max_positions=list(table.position_sizes)
    )
    model = SANE(config)
    model.save_pretrained(tmp_path / "model", {"token_size": table.token_size, "architectures": {"cnn": architecture}})
    arguments = [str(tmp_path / "model"), str(parity / "cnn_a.safetensors"), ",".join(ABSENT)]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    model.preprocessing = json.loads((tmp_path / "model" / "config.json").read_text())["preprocessing"]
    expected = model.encode_model(network).double().sum()
    torch.testing.assert_close(torch.tensor(float(done.stdout), dtype=torch.float64), expected, rtol=1e-5, atol=1e-5)
