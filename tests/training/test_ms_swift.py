"""The plug-in of ``examples/ms_swift_plugin.py`` under ms-swift, in an environment of its own: it wants older packages than we."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPT = "import sys\nfrom swift.pipelines import sft_main\nsft_main(sys.argv[1:])\n"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("swift") is None, reason="ms-swift is not installed")
def test_ms_swift_trains_with_the_plug_in(tmp_path):
    from tests.models import small_checkpoints as small

    from sfumato.privacy import ledger

    small.write_llama(tmp_path / "llama")
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(record) for record in small.chats(120)))
    options = {
        "external_plugins": ROOT / "examples" / "ms_swift_plugin.py", "model": tmp_path / "llama", "model_type": "llama",
        "template": "default", "dataset": tmp_path / "data.jsonl", "output_dir": tmp_path / "out", "max_steps": 3,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_grad_norm": 1.0, "report_to": "none",
        "dataloader_num_workers": 0, "split_dataset_ratio": 0, "torch_dtype": "float32", "fp16": "false", "bf16": "false",
        "tuner_type": "lora", "add_version": "false", "use_hf": "true",
    }  # fmt: skip
    given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT, *given], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    held = ledger.show(tmp_path / "out" / "ledger.db")
    assert held["steps"] == 3 and 7.9 < held["epsilon"] <= 8.0
    assert (tmp_path / "out" / "checkpoint-3" / "adapter_model.safetensors").is_file()
