"""Networks trained elsewhere become runs on which the analyses work; what does not fit is refused by name."""

import json
import pickle
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline import atlas, import_model, sweep, tables
from pipeline.analyses import deconv, occlusion, top9
from pipeline.cluster import Workers
from pipeline.context import Options as SweepOptions
from pipeline.import_model import Options
from pipeline.indexing import index_shards
from pipeline.runs import Run, RunError
from pipeline.shards import Index
from tests.conftest import CLASSES, SHARED
from zfnet import images, models
from zfnet.deconv import Unprojectable
from zfnet.graph import UnknownLayer

TINY = f"{__name__}:tiny"
MAPS = f"{__name__}:maps_alone"


def tiny(num_classes: int = 3) -> nn.Module:
    """A small network of somebody else's."""
    torch.manual_seed(7)
    body = nn.Sequential(nn.Conv2d(3, 4, 5, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU())
    return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, num_classes))


def maps_alone() -> nn.Module:
    """The same without its classifier."""
    return tiny()[0]


@pytest.fixture
def sizes():
    return {"resize_px": 40, "crop_px": 32}


@pytest.fixture
def weights(tmp_path):
    """A file of the tiny network's weights, under another seed."""
    tensors = {name: tensor + 0.1 for name, tensor in tiny().state_dict().items()}
    save_file(tensors, tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


def imported(tmp_path, name="run", **options) -> Run:
    assert import_model.run(Options(run=str(tmp_path / name), **options)) == 0
    return Run.at(str(tmp_path / name))


# ---------------------------------------------------------------------------------------------------- what is imported


def test_an_imported_network_comes_back_with_its_weights_classes_and_preprocessing(tmp_path, weights, sizes):
    (tmp_path / "classes.txt").write_text("cat\ndog\nbird\n\n")
    given = {"channels": "BGR", "maximum": 1.0, "mean": (0.1, 0.2, 0.3), "std": (2.0, 3.0, 4.0)}
    run = imported(
        tmp_path, architecture=TINY, weights=str(weights), classes=str(tmp_path / "classes.txt"), **sizes, **given
    )
    model = run.load_model()
    assert model.classes == ("cat", "dog", "bird")
    assert {n: t.tolist() for n, t in model.network.state_dict().items()} == {
        n: t.tolist() for n, t in load_file(weights).items()
    }
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    by_hand = pixels.flip(-1).float() / 255 - torch.tensor(given["mean"])
    by_hand = (by_hand / torch.tensor(given["std"])).permute(0, 3, 1, 2)
    torch.testing.assert_close(model.preprocessing.normalise(pixels), by_hand, rtol=1e-5, atol=1e-6)


def test_random_weights_follow_from_the_seed_and_leave_torchs_generator_alone(tmp_path):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    options = {"architecture": "zfnet_small"}
    ids = [imported(tmp_path, str(i), **options, seed=s).describe()["model_id"] for i, s in enumerate((0, 0, 1))]
    assert torch.equal(torch.get_rng_state(), state)
    assert ids[0] == ids[1] != ids[2]
    assert Run.at(str(tmp_path / "0")).load_model().preprocessing.describe() == {
        "resize_px": 72, "crop_px": 64, "channels": "RGB", "maximum": 255.0
    }  # fmt: skip


def test_random_networks_get_as_many_outputs_as_there_are_class_names(tmp_path, sizes):
    (tmp_path / "classes.txt").write_text("a\nb\n")
    run = imported(tmp_path, architecture="torchvision:squeezenet1_1", classes=str(tmp_path / "classes.txt"), **sizes)
    assert run.load_model().network.classifier[1].out_channels == 2


def test_the_number_of_classes_is_that_of_the_files_last_layer(tmp_path, sizes):
    small = torchvision.models.squeezenet1_1(num_classes=7)
    torch.save(small.state_dict(), tmp_path / "seven.pth")
    run = imported(tmp_path, architecture="torchvision:squeezenet1_1", weights=str(tmp_path / "seven.pth"), **sizes)
    model = run.load_model()
    assert model.classes == tuple("0123456")
    assert torch.equal(model.network.classifier[1].weight, small.classifier[1].weight)


def test_torchvisions_networks_get_its_preprocessing_and_class_names(tmp_path):
    torch.save(torchvision.models.squeezenet1_1().state_dict(), tmp_path / "w.pth")
    model = imported(tmp_path, architecture="torchvision:squeezenet1_1", weights=str(tmp_path / "w.pth")).load_model()
    transform = torchvision.models.SqueezeNet1_1_Weights.DEFAULT.transforms()
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    theirs = transform(torch.from_numpy(pixels).permute(2, 0, 1).contiguous())
    pixels_of_256 = images.Image.fromarray(pixels).resize((256, 256), images.Image.Resampling.BILINEAR)
    ours, _ = images.centre_crop(pixels_of_256, model.preprocessing.resize_px, model.preprocessing.crop_px)
    assert model.preprocessing.describe() == {"resize_px": 256, "crop_px": 224, "channels": "RGB", "maximum": 1.0}
    torch.testing.assert_close(
        model.preprocessing.normalise(torch.from_numpy(ours.copy())[None])[0], theirs, rtol=0, atol=1.5 / 255 / 0.22
    )
    assert (len(model.classes), model.classes[1]) == (1000, "goldfish")


def test_a_mean_for_each_pixel_comes_from_a_file(tmp_path, sizes):
    mean = np.random.default_rng(0).random((3, 40, 40), dtype=np.float32)
    np.save(tmp_path / "mean.npy", mean)
    run = imported(tmp_path, architecture=TINY, mean_image=str(tmp_path / "mean.npy"), **sizes)
    assert torch.equal(run.load_model().preprocessing.mean, torch.from_numpy(mean))
    with pytest.raises(RunError, match=r"\(3, 40, 40\): give \(3, 1, 1\), or \(3, 72, 72\)"):
        imported(tmp_path, "other", architecture="zfnet_small", mean_image=str(tmp_path / "mean.npy"))


def test_googlenets_preprocessing_is_what_transform_input_does():
    torch.manual_seed(0)
    theirs = torchvision.models.googlenet(aux_logits=True, init_weights=False, transform_input=True).eval()
    ours = models.build("torchvision:googlenet").eval()
    models.load_tensors(ours, theirs.state_dict())
    pixels = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    standard = ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = theirs(standard)
        got = ours(models.preprocessing_of("torchvision:googlenet").normalise(pixels))
    assert ((got - expected).abs().max() / expected.abs().max()).item() < 1e-5


# ------------------------------------------------------------------------------------------------------- files, refused


@pytest.mark.parametrize("wrap", [dict, lambda t: {"state_dict": t, "epoch": 3}, lambda t: {"model": t}])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_checkpoints_of_every_usual_form_are_read(tmp_path, sizes, wrap, prefix):
    tensors = tiny().state_dict()
    torch.save(wrap({prefix + name: tensor for name, tensor in tensors.items()}), tmp_path / "w.pt")
    run = imported(tmp_path, architecture=TINY, weights=str(tmp_path / "w.pt"), **sizes)
    assert torch.equal(run.load_model().network[3].weight, tensors["3.weight"])


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


def test_nothing_is_ever_unpickled(tmp_path, sizes):
    marker = tmp_path / "was-run"
    torch.save({"0.0.weight": Malicious(marker)}, tmp_path / "bad.pt")
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps(Malicious(marker), protocol=2))
    torch.save(tiny(), tmp_path / "whole.pt")
    (tmp_path / "text.safetensors").write_text("no weights")
    for name in ("bad.pt", "bad.pkl", "whole.pt", "text.safetensors"):
        with pytest.raises(RunError, match=f"{name} cannot be read as weights: .*Give safetensors"):
            imported(tmp_path, architecture=TINY, weights=str(tmp_path / name), **sizes)
    assert not marker.exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("0.0.bias"), "1 tensors are missing: 0.0.bias"),
        (lambda t: t.update(extra=torch.zeros(1)), "1 tensors are unexpected: extra"),
        (lambda t: t.update({"0.0.bias": torch.zeros(5)}), "1 tensors do not fit: 0.0.bias is 5 and should be 4"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, sizes, change, message):
    tensors = tiny().state_dict()
    change(tensors)
    torch.save(tensors, tmp_path / "w.pt")
    with pytest.raises(RunError, match=message):
        imported(tmp_path, architecture=TINY, weights=str(tmp_path / "w.pt"), **sizes)
    assert not (tmp_path / "run").exists()


def test_weights_of_a_part_name_the_part(tmp_path):
    whole = torchvision.models.squeezenet1_1().state_dict()
    torch.save({n: t for n, t in whole.items() if n.startswith("features.")}, tmp_path / "part.pt")
    options = {"weights": str(tmp_path / "part.pt"), "crop_px": 64}
    with pytest.raises(RunError, match=r"missing: classifier.1.weight.*those of its part 'features' alone"):
        imported(tmp_path, architecture="torchvision:squeezenet1_1", **options)
    model = imported(tmp_path, architecture="torchvision:squeezenet1_1.features", **options).load_model()
    assert model.classes == ()
    assert torch.equal(model.network.features[0].weight, whole["features.0.weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "zfnet_smal"}, "Did you mean 'zfnet_small'"),
        ({"architecture": "torchvision:resnet19"}, "torchvision:resnet18"),
        ({"architecture": "torchvision:resnet18.head"}, "no part 'head'; its parts are conv1, bn1"),
        ({"architecture": "no.such:function"}, "No module named 'no'.*PYTHONPATH"),
        ({"architecture": f"{__name__}:nothing"}, "no attribute 'nothing'"),
        ({"architecture": "os:getcwd"}, "returned a str; expected a torch.nn.Module"),
        ({"architecture": "pickle:dumps"}, "missing a required argument: 'obj'"),
        ({"architecture": TINY, "weights": "nowhere.pt"}, "no file .*nowhere.pt; torchvision's own weights .*: none"),
        ({"architecture": TINY, "maximum": 0.0}, "maximum is 0"),
        ({"architecture": TINY, "std": (1.0, 0.0, 1.0)}, "three numbers above zero"),
        ({"architecture": TINY, "crop_px": 40, "resize_px": 30}, "does not fit"),
    ],
)
def test_what_cannot_be_imported_is_refused(tmp_path, options, message):
    with pytest.raises(RunError, match=message):
        imported(tmp_path, **options)
    assert not (tmp_path / "run").exists()


def test_class_names_must_be_as_many_as_the_outputs(tmp_path, weights, sizes):
    (tmp_path / "two.txt").write_text("a\nb\n")
    with pytest.raises(RunError, match=r"has 2 names.*has 3 outputs"):
        imported(tmp_path, architecture=TINY, weights=str(weights), classes=str(tmp_path / "two.txt"), **sizes)


def test_torchvisions_own_weights_are_fetched_by_name_or_refused(tmp_path, monkeypatch):
    tensors = torchvision.models.squeezenet1_1().state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *args, **kwargs: tensors)
    options = {"architecture": "torchvision:squeezenet1_1", "weights": "IMAGENET1K_V1"}
    model = imported(tmp_path, **options).load_model()
    assert torch.equal(model.network.features[0].weight, tensors["features.0.weight"])

    def no_network(*args, **kwargs):
        raise URLError("no route")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    with pytest.raises(RunError, match=r"IMAGENET1K_V1 could not be fetched.*give the file"):
        imported(tmp_path, "other", **options)


def test_a_run_holds_one_model(tmp_path, weights, sizes):
    options = {"architecture": TINY, "weights": str(weights), **sizes}
    before = imported(tmp_path, **options).describe()
    assert imported(tmp_path, **options).describe() == before
    with pytest.raises(RunError, match="holds another model"):
        imported(tmp_path, **options, maximum=1.0)
    training = tmp_path / "training" / "checkpoints"
    training.mkdir(parents=True)
    (training / "training.json").write_text("{}")
    with pytest.raises(RunError, match="unfinished training"):
        imported(tmp_path, "training", **options)


# ---------------------------------------------------------------------------------------------------- analyses on them


def options_for(run: Run, data) -> SweepOptions:
    return SweepOptions(run=str(run.location), data=str(data), workers=Workers(num=0))


def test_every_analysis_works_on_an_imported_network(tmp_path, make_shards, weights, sizes):
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    run = imported(tmp_path, architecture=TINY, weights=str(weights), classes=str(tmp_path / "classes.txt"), **sizes)
    sweeps = options_for(run, make_shards(val=[6]))
    assert sweep.run(top9.ANALYSIS, sweeps, top9.Config()) == 0
    assert sweep.run(deconv.ANALYSIS, sweeps, deconv.Config()) == 0
    assert sweep.run(occlusion.ANALYSIS, sweeps, occlusion.Config(first=2, stride_px=12)) == 0
    atlas.build(run, atlas.Options())
    projected, found = (tables.read(run.slice(table, "0.3")) for table in ("deconv", "top9"))
    assert projected.num_rows == found.num_rows > 0
    assert tables.read(run.slice("occlusion", "images"))["clean_class_name"].to_pylist()[0] in CLASSES


def test_a_network_without_classes_is_swept_projected_and_shown_and_cannot_be_occluded(tmp_path, make_shards, sizes):
    run = imported(tmp_path, architecture=MAPS, **sizes)
    assert run.load_model().classes == ()
    sweeps = options_for(run, make_shards(val=[6]))
    assert sweep.run(top9.ANALYSIS, sweeps, top9.Config()) == 0
    assert sweep.run(deconv.ANALYSIS, sweeps, deconv.Config()) == 0
    atlas.build(run, atlas.Options())
    assert "no classes" in (tmp_path / "run" / "atlas" / "index.html").read_text()
    with pytest.raises(RunError, match="occlusion needs class probabilities.*has no classifier"):
        sweep.run(occlusion.ANALYSIS, sweeps, occlusion.Config(first=2))


def test_what_is_not_understood_is_named_before_the_work_and_sweeps_work(tmp_path, make_shards, capsys):
    run = imported(tmp_path, architecture="torchvision:mobilenet_v3_small", resize_px=40, crop_px=32)
    assert "operations are not understood (Hardswish: features.0.2" in capsys.readouterr().out
    assert sweep.run(top9.ANALYSIS, options_for(run, make_shards(val=[4])), top9.Config()) == 0
    with pytest.raises(Unprojectable, match="features.12.0.*Hardswish"):
        sweep.run(occlusion.ANALYSIS, options_for(run, tmp_path / "shards"), occlusion.Config(first=1))
    said = capsys.readouterr().out
    assert said.index("are not understood") < said.index("parts to do")
    assert len(run.manifest("top9")) == len([m for m in run.load_model().network.modules() if type(m) is nn.Conv2d])


# ------------------------------------------------------------------------------------------------------- real networks


@pytest.mark.parametrize(("name", "right"), [("squeezenet1_1", (83, 120)), ("squeezenet1_0", (91, 108))])
def test_squeezenets_answer_the_photos_as_often_as_their_readme_says(tmp_path, shared_data, name, right):
    photos, file = shared_data("imagenet-samples"), SHARED / "weights" / f"{name}.safetensors"
    index_shards([str(photos / "val-000000.tar")], str(tmp_path / "index"), classes=None, accept_damaged=False)
    run = imported(
        tmp_path,
        architecture=f"torchvision:{name}",
        weights=str(file),
        classes=str(photos / "classes.txt"),
        resize_px=256,
        crop_px=227,
        channels="BGR",
        mean=(104, 117, 123),
    )
    model, index = run.load_model(), Index.load(str(photos), str(tmp_path / "index"))
    assert model.classes == tuple((photos / "classes.txt").read_text().split())
    top1 = top5 = 0
    for sample in index.read(index.split("val")):
        pixels, _ = images.centre_crop(images.decode(sample.image), 256, 227)
        with torch.no_grad():
            best = model.network(model.preprocessing.normalise(torch.from_numpy(pixels.copy())[None]))[0].topk(5)
        top1 += int(best.indices[0]) == sample.label
        top5 += sample.label in best.indices.tolist()
    assert (top1, top5) == right


def test_alexnets_convolutions_without_a_classifier(tmp_path):
    file = SHARED / "weights" / "alexnet_features.safetensors"
    if not file.exists():
        pytest.skip("the trained weights are not beside the project (../shared/weights)")
    model = imported(tmp_path, architecture="torchvision:alexnet.features", weights=str(file)).load_model()
    assert model.classes == ()
    tensors = load_file(file)
    assert all(torch.equal(t, tensors[n].float()) for n, t in model.network.state_dict().items())
    assert json.loads((tmp_path / "run" / "run.json").read_text())["classes"] == []


def units_alone() -> nn.Module:
    """No convolution at all."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5), nn.ReLU(), nn.Linear(5, 3))


def test_a_network_without_convolutions_is_swept_by_the_layers_that_are_named(tmp_path, make_shards, sizes):
    run = imported(tmp_path, architecture=f"{__name__}:units_alone", **sizes)
    options = SweepOptions(run=str(run.location), data=str(make_shards(val=[5])), workers=Workers(num=0))
    with pytest.raises(UnknownLayer, match=r"no convolution: give --layers, of 1, 3"):
        sweep.run(top9.ANALYSIS, options, top9.Config())
    assert sweep.run(top9.ANALYSIS, options, top9.Config(layers=("1",))) == 0
