import pytest
import timm

from widekernel.errors import ConfigError, WidekernelError
from widekernel.tasks.assembly import build_model


def test_no_pretrained_weights():
    with pytest.raises(ConfigError, match=r"weights of slak_nano cannot be loaded: .*Set model\.pretrained to false"):
        build_model("slak_nano", None, {}, pretrained=True)


@pytest.mark.parametrize("pretrained", [False, True])
@pytest.mark.parametrize("error", [ConnectionError("no network"), FileNotFoundError("not in the cache"), RuntimeError("x")])
def test_an_unreachable_hub_is_explained(monkeypatch, error, pretrained):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(ConfigError, match=f"hf-hub:foo/bar cannot be loaded: {error}"):
        build_model("hf-hub:foo/bar", None, {}, pretrained)


@pytest.mark.parametrize("name", ["foo:bar", "local-dir:does/not/exist"])
def test_other_sources_of_models(name):
    with pytest.raises(ConfigError, match=f"The model {name} cannot be loaded"):
        build_model(name, None, {})


@pytest.mark.parametrize(
    ("model", "words"),
    [("slak_nano", "drop_path_rate is 'abc', but must be a number"), ("test_resnet", r"types of model\.args")],
)
def test_arguments_of_a_wrong_type(model, words):
    with pytest.raises(WidekernelError, match=words) as caught:
        build_model(model, None, {"drop_path_rate": "abc"})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
