"""`kd-accel layers`: names and shapes of the layers of architectures and runs."""

import pytest

from tests.support.in_process import say, train

RESNET18 = """torchvision/resnet18, images of 64x64 pixels:
  conv1    64x32x32
  relu     64x32x32
  maxpool  64x16x16
  layer1   64x16x16  auto
  layer2   128x8x8   auto
  layer3   256x4x4   auto
  layer4   512x2x2   auto
  avgpool  512x1x1
"""
MOBILENET = """torchvision/mobilenet_v3_small, images of 32x32 pixels:
  features.1   16x8x8   auto
  features.3   24x4x4   auto
  features.8   48x2x2   auto
  features.11  96x1x1   auto
  features     576x1x1
  avgpool      576x1x1
"""


def test_layers_of_an_architecture():
    output = say("layers", "torchvision/resnet18", "--image_size=64")
    assert output == RESNET18
    assert "layer1.0.conv1" not in output and "  layer1.0.conv1" in say("layers", "torchvision/resnet18", "--all")
    assert "  layer4   512x4x4    auto\n" in say("layers", "torchvision/resnet18", "--stem=cifar")
    assert say("layers", "torchvision/mobilenet_v3_small") == MOBILENET


def test_layers_of_an_architecture_with_arguments():
    output = say("layers", "timm/vit_tiny_patch16_224", "--arch_args", "{img_size: 32, patch_size: 4, depth: 4}")
    assert output.count("192x8x8") == 10 and output.count("192x8x8  auto\n") == 4
    assert "  blocks.3     192x8x8  auto\n" in output


def test_printed_layers_of_a_run_can_be_compared(tmp_path):
    train(tmp_path / "run", "--train.max_steps=1")
    lines = say("layers", tmp_path / "run").splitlines()
    assert lines[0].endswith("images of 32x32 pixels:")
    names = [line.split()[0] for line in lines[1:]]
    feature = f"--distill.features.mse={{layers: [{', '.join(names)}], args: {{direction: student_to_teacher}}}}"
    train(tmp_path / "student", f"--teacher.run={tmp_path}/run", feature, "--train.max_steps=1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["torchvision/resnet81"], "did you mean torchvision/resnet18"),
        (["torchvision/resnet18", "--image_size=0"], "--image_size: 0 must be at least 1"),
        (["nowhere"], "nowhere"),
        (["torchvision/resnet18", "--stem=small"], "--stem"),
        (["torchvision/resnet18", "--arch_args=[1]"], "--arch_args: must be settings as '{key: value}', not '[1]'"),
        (["torchvision/resnet18", "--arch_args={a"], "--arch_args: must be settings as '{key: value}', not '{a'"),
        (["torchvision/resnet18", "--arch_args={wings: 2}"], "layers.arch_args: torchvision/resnet18 does not accept"),
        (["timm/vit_tiny_patch16_224"], "set arch_args: {img_size: 32}, or choose another size or arch"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    assert message in say("layers", *arguments, code=2)
