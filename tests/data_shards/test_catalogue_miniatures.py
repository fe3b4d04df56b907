"""Miniatures of catalogue entries: tiny files in the documented layout, built as a user would build the real ones."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
from PIL import Image
from toy import LPS_AFFINE, save_nifti

import data_shards
from data_shards.build import build
from data_shards.dataset import ShardDataset
from data_shards.spec import load_spec
from data_shards.triplet import Triplet

FOLDER = Path(data_shards.__file__).parent / "catalogue"
Square = tuple[int, int]
Writer = Callable[[Path], Counter[tuple[str, str]]]
WRITERS: dict[str, Writer] = {}
SIDE = 24


def miniature(name: str) -> Callable[[Writer], Writer]:
    """Mark a function that writes an entry's files and returns how many masks of (term, kind) they hold."""

    def add(writer: Writer) -> Writer:
        WRITERS[name] = writer
        return writer

    return add


def picture(path: Path, seed: int = 0, colours: bool = False) -> None:
    """Write an image of noise."""
    shape = (SIDE, SIDE, 3) if colours else (SIDE, SIDE)
    save(path, np.random.default_rng(seed).integers(0, 255, shape).astype(np.uint8))


def save(path: Path, array: np.ndarray) -> None:
    """Write an array; lossy formats at their best."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **({"quality": 95} if path.suffix in (".jpg", ".jpeg") else {}))


def squares(*places: Square, value: int = 255) -> np.ndarray:
    """Return a mask with squares of 5 × 5 at (row, column)."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    for row, column in places:
        mask[row : row + 5, column : column + 5] = value
    return mask


def volume(path: Path, **values: int) -> Path:
    """Write a volume of labels: block after block, one slice apart, each value in two slices."""
    labels = np.zeros((2 * len(values) + 2, SIDE, SIDE), np.uint8)
    for number, value in enumerate(values.values()):
        labels[2 * number : 2 * number + 2, 4:12, 4:12] = value
    return save_nifti(path, labels)


def scan(path: Path, depth: int, seed: int = 0, channels: int = 1) -> None:
    """Write a volume of noise; several channels are a fourth axis."""
    noise = np.random.default_rng(seed).integers(-500, 500, (channels, depth, SIDE, SIDE)).astype(np.int16)
    if channels == 1:
        save_nifti(path, noise[0])
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(noise.transpose(3, 2, 1, 0), LPS_AFFINE), path)


@miniature("covid_qu_ex")
def write_covid_qu_ex(root: Path) -> Counter[tuple[str, str]]:
    base = root / "Lung Segmentation Data" / "Lung Segmentation Data"
    for number, (part, group) in enumerate((p, g) for p in ("Train", "Val", "Test") for g in ("Normal", "COVID-19")):
        folder = base / part / group
        picture(folder / "images" / "a (1).png", number)
        save(folder / "lung masks" / "a (1).png", squares((5, 2), (5, 14)))
    return Counter({("lung", "semantic"): 6, ("lung", "instance"): 12})


@miniature("chest_xray_masks_and_labels")
def write_chest_xray(root: Path) -> Counter[tuple[str, str]]:
    base = root / "Lung Segmentation"
    for number in range(6):
        picture(base / "CXR_png" / f"CHNCXR_000{number}_0.png", number)
        picture(base / "CXR_png" / f"MCUCXR_000{number}_1.png", number)
        save(base / "masks" / f"MCUCXR_000{number}_1.png", squares((5, 2)))
        if number:  # one image of Shenzhen has no mask, and is left out
            save(base / "masks" / f"CHNCXR_000{number}_0_mask.png", squares((5, 2), (5, 14)))
    return Counter({("lung", "semantic"): 11, ("lung", "instance"): 16})


@miniature("btxrd")
def write_btxrd(root: Path) -> Counter[tuple[str, str]]:
    for number in range(8):
        picture(root / "BTXRD" / "images" / f"IMG{number}.{'jpeg' if number % 2 else 'jpg'}", number)
        if number < 5:
            save(root / "BTXRD" / "masks" / f"IMG{number}.png", squares((5, 2)))
    return Counter({("bone tumor", "semantic"): 5, ("bone tumor", "instance"): 5, ("", ""): 3})


@miniature("arcade")
def write_arcade(root: Path) -> Counter[tuple[str, str]]:
    for part in ("train", "val", "test"):
        base = root / "arcade" / "stenosis" / part
        images, annotations = [], []
        for number in (1, 2, 3):
            picture(base / "images" / f"{number}.png", number)
            images.append({"id": number, "file_name": f"{number}.png", "height": SIDE, "width": SIDE})
            for left in (2, 14)[: 1 + number % 2]:  # images 1 and 3 have two
                polygon = [left, 4, left + 6, 4, left + 6, 10, left, 10]
                annotations.append({"image_id": number, "category_id": 26, "segmentation": [polygon]})
        for number, annotation in enumerate(annotations):
            annotation.update(id=number + 1, iscrowd=0, bbox=[0, 0, 1, 1], area=36)
        (base / "annotations").mkdir(parents=True)
        categories = [{"id": 1, "name": "1"}, {"id": 26, "name": "stenosis"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (base / "annotations" / f"{part}.json").write_text(json.dumps(content))
    name = "coronary artery stenosis"
    return Counter({(name, "semantic"): 9, (name, "instance"): 15})


@miniature("busi")
def write_busi(root: Path) -> Counter[tuple[str, str]]:
    for kind, count in (("benign", 9), ("malignant", 9), ("normal", 1)):
        for number in range(1, count + 1):
            stem = root / "Dataset_BUSI_with_GT" / kind / f"{kind} ({number})"
            picture(stem.with_name(f"{stem.name}.png"), number, colours=True)
            save(stem.with_name(f"{stem.name}_mask.png"), squares(*([] if kind == "normal" else [(2, 2)])))
    save(root / "Dataset_BUSI_with_GT" / "benign" / "benign (3)_mask_1.png", squares((14, 14)))
    return Counter({("breast tumor", "semantic"): 18})


@miniature("us_nerve")
def write_us_nerve(root: Path) -> Counter[tuple[str, str]]:
    for patient in range(1, 8):
        for number in (1, 2):
            picture(root / "train" / f"{patient}_{number}.tif", patient)
            save(root / "train" / f"{patient}_{number}_mask.tif", squares(*([(3, 3)] if number == 1 else [])))
    return Counter({("brachial plexus", "semantic"): 7})


@miniature("acouslic")
def write_acouslic(root: Path) -> Counter[tuple[str, str]]:
    for number in range(8):
        frames = np.random.default_rng(number).integers(0, 255, (6, SIDE, SIDE)).astype(np.uint8)
        labels = np.zeros_like(frames)
        labels[1, 3:9, 3:9], labels[2, 3:9, 3:9] = 1, 2
        for folder, array in (("images/stacked_fetal_ultrasound", frames), ("masks/stacked_fetal_abdomen", labels)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array), str(root / folder / f"sweep{number}.mha"))
    return Counter({("fetal abdomen", "semantic"): 16})


@miniature("cholecseg8k")
def write_cholecseg8k(root: Path) -> Counter[tuple[str, str]]:
    for video in range(1, 8):
        stem = root / f"video{video:02d}" / f"video{video:02d}_00080" / "frame_80_endo"
        picture(stem.with_name("frame_80_endo.png"), video, colours=True)
        mask = np.full((SIDE, SIDE), 50, np.uint8)
        mask[2:6, 2:6], mask[10:14, 2:6], mask[2:6, 12:16] = 21, 21, 31
        opaque = np.full((SIDE, SIDE), 255, np.uint8)
        planes = [mask, mask, mask, *([opaque] if video == 1 else [])]
        save(stem.with_name("frame_80_endo_watershed_mask.png"), np.stack(planes, axis=-1))
    liver, grasper = ("liver", "semantic"), ("grasper", "semantic")
    return Counter({liver: 7, ("liver", "instance"): 14, grasper: 7, ("grasper", "instance"): 7})


@miniature("m2caiseg")
def write_m2caiseg(root: Path) -> Counter[tuple[str, str]]:
    for part in ("train", "trainval", "test"):
        for number in range(4):
            video = number + (10 if part == "test" else 0)
            base = root / "m2caiSeg dataset" / part
            picture(base / "images" / f"{video}_125.jpg", number, colours=True)
            mask = np.zeros((SIDE, SIDE, 3), np.uint8)
            mask[2:8, 2:8], mask[2:8, 12:18], mask[12:18, 2:8] = (85, 170, 0), (170, 170, 170), (0, 85, 255)
            save(base / "groundtruth" / f"{video}_125_gt.png", mask)
    return Counter({(term, "semantic"): 8 for term in ("liver", "surgical clip", "bipolar forceps")})


@miniature("bkai_igh_neopolyp")
def write_bkai(root: Path) -> Counter[tuple[str, str]]:
    for number in range(7):
        picture(root / "train" / "train" / f"{number}.jpeg", number, colours=True)
        mask = np.zeros((SIDE, SIDE, 3), np.uint8)
        mask[:8, :8], mask[16:, 16:] = (255, 0, 0), (0, 255, 0)
        save(root / "train_gt" / "train_gt" / f"{number}.jpeg", mask)
    terms = ("neoplastic polyp", "non-neoplastic polyp")
    return Counter({(term, kind): 7 for term in terms for kind in ("semantic", "instance")})


@miniature("pannuke")
def write_pannuke(root: Path) -> Counter[tuple[str, str]]:
    for number in range(7):
        picture(root / "fold_1" / "images" / f"{number:06d}.png", number, colours=True)
        for kind in ("neoplastic", "inflammatory", "connective", "dead", "epithelial"):
            nuclei = np.zeros((SIDE, SIDE), np.uint16)
            if kind in ("neoplastic", "dead"):
                nuclei[2:6, 2:6], nuclei[2:6, 6:10] = 7, 300  # they touch: only their numbers tell them apart
            save(root / "fold_1" / kind / f"{number:06d}.tif", nuclei)
    terms = ("neoplastic cell nucleus", "dead cell nucleus")
    return Counter({(term, kind): times for term in terms for kind, times in (("semantic", 7), ("instance", 14))})


@miniature("glas")
def write_glas(root: Path) -> Counter[tuple[str, str]]:
    for number in range(7):
        stem = root / "Warwick_QU_Dataset" / f"testA_{number}"
        picture(stem.with_name(f"{stem.name}.bmp"), number, colours=True)
        save(stem.with_name(f"{stem.name}_anno.bmp"), squares((2, 2), value=1) + squares((2, 7), value=2))
    return Counter({("gland", "semantic"): 7, ("gland", "instance"): 14})


@miniature("nucmm_z")
def write_nucmm(root: Path) -> Counter[tuple[str, str]]:
    for number in range(7):
        pages = np.random.default_rng(number).integers(0, 255, (4, SIDE, SIDE)).astype(np.uint8)
        labels = np.zeros_like(pages)
        labels[1:3, 2:6, 2:6], labels[2, 2:6, 6:10] = 1, 2
        for folder, array in (("Image", pages), ("Label", labels)):
            path = root / folder / "train" / f"{number}.tif"
            path.parent.mkdir(parents=True, exist_ok=True)
            first, *rest = (Image.fromarray(page) for page in array)
            first.save(path, save_all=True, append_images=rest)
    return Counter({("cell nucleus", "semantic"): 14, ("cell nucleus", "instance"): 21})


@miniature("intraretinal_cystoid_fluid")
def write_cystoid_fluid(root: Path) -> Counter[tuple[str, str]]:
    for number in range(7):
        folder = root / "2021-training-data-ZA" / "2021-training-data-ZA" / f"{number}DME"
        picture(folder / "images" / "scan.jpg", number)
        save(folder / "masks" / f"{number}DME.png", squares((2, 2), (12, 12)))
    term = "intraretinal cystoid fluid"
    return Counter({(term, "semantic"): 7, (term, "instance"): 14})


@miniature("papila")
def write_papila(root: Path) -> Counter[tuple[str, str]]:
    for patient in range(7):
        for eye in ("OD", "OS"):
            picture(root / "FundusImages" / f"RET00{patient}{eye}.jpg", patient, colours=True)
            save(root / "masks" / f"RET00{patient}{eye}_disc.png", squares((4, 4), (4, 9)))
            save(root / "masks" / f"RET00{patient}{eye}_cup.png", squares((4, 4)))
    return Counter({("optic disc", "semantic"): 14, ("optic cup", "semantic"): 14})


@miniature("drive")
def write_drive(root: Path) -> Counter[tuple[str, str]]:
    for number in range(21, 28):
        picture(root / "training" / "images" / f"{number}_training.tif", number, colours=True)
        save(root / "training" / "1st_manual" / f"{number}_manual1.gif", squares((4, 4)))
    return Counter({("retinal blood vessel", "semantic"): 7})


@miniature("chase_db1")
def write_chase_db1(root: Path) -> Counter[tuple[str, str]]:
    for patient in range(3):
        for eye in "LR":
            picture(root / f"Image_0{patient}{eye}.jpg", patient, colours=True)
            for observer in ("1st", "2nd"):
                path = root / f"Image_0{patient}{eye}_{observer}HO.png"
                Image.fromarray(squares((4, 4))).convert("1").save(path)
    return Counter({("retinal blood vessel", "semantic"): 6})


@miniature("stare")
def write_stare(root: Path) -> Counter[tuple[str, str]]:
    for number in range(3):
        picture(root / "images" / f"im000{number}.ppm", number, colours=True)
        save(root / "labels-ah" / f"im000{number}.ah.ppm", np.stack([squares((4, 4))] * 3, axis=-1))
    return Counter({("retinal blood vessel", "semantic"): 3})


@miniature("flare22")
def write_flare22(root: Path) -> Counter[tuple[str, str]]:
    for number in range(10):
        stem = f"FLARE22_Tr_{number:04d}"
        labels = np.zeros((8, SIDE, SIDE), np.uint8)
        labels[1:5, 2:18, 2:18], labels[6, 2:12, 2:12] = 1, 12  # 1,024 voxels of liver; of duodenum too few
        save_nifti(root / "FLARE22Train" / "labels" / f"{stem}.nii.gz", labels)
        scan(root / "FLARE22Train" / "images" / f"{stem}_0000.nii.gz", 8, number)
    return Counter({("liver", "semantic"): 40})


@miniature("amos_mr")
def write_amos(root: Path) -> Counter[tuple[str, str]]:
    for number in (1, 2, *range(507, 517)):  # CT, and MR
        scan(root / "amos22" / "imagesTr" / f"amos_{number:04d}.nii.gz", 6, number)
        volume(root / "amos22" / "labelsTr" / f"amos_{number:04d}.nii.gz", spleen=1, bladder=14)
    scan(root / "amos22" / "imagesTs" / "amos_0600.nii.gz", 6)  # no labels: left out
    return Counter({("spleen", "semantic"): 20, ("urinary bladder", "semantic"): 20})


@miniature("totalsegmentator")
def write_totalsegmentator(root: Path) -> Counter[tuple[str, str]]:
    for number in range(10):
        scan(root / f"s{number:04d}" / "ct.nii.gz", 4, number)
        for name, value in (("kidney_left", 1), ("vertebrae_L5", 1), ("spleen", 0)):
            volume(root / f"s{number:04d}" / "segmentations" / f"{name}.nii.gz", label=value)
    return Counter({("left kidney", "semantic"): 20, ("vertebra L5", "semantic"): 20})


@miniature("msd_task01_braintumour")
def write_brain_tumour(root: Path) -> Counter[tuple[str, str]]:
    base = root / "Task01_BrainTumour"
    for number in range(10):
        volume(base / "labelsTr" / f"BRATS_{number:03d}.nii.gz", edema=1, core=2, enhancing=3)
        scan(base / "imagesTr" / f"BRATS_{number:03d}.nii.gz", 8, channels=4)
        (base / "imagesTr" / f"._BRATS_{number:03d}.nii.gz").touch()  # as the archive has them
    parts = ("peritumoral edema", "non-enhancing tumor core", "enhancing tumor")
    return Counter({("brain tumor", "semantic"): 60, **{(part, "semantic"): 20 for part in parts}})


@miniature("acdc")
def write_acdc(root: Path) -> Counter[tuple[str, str]]:
    for patient in range(1, 4):
        folder = root / "ACDC" / "database" / "training" / f"patient{patient:03d}"
        for frame in ("01", "12"):
            scan(folder / f"patient{patient:03d}_frame{frame}.nii.gz", 8)
            volume(folder / f"patient{patient:03d}_frame{frame}_gt.nii.gz", right=1, muscle=2, left=3)
    return Counter({(term, "semantic"): 12 for term in ("right ventricle", "myocardium", "left ventricle")})


@miniature("han_seg")
def write_han_seg(root: Path) -> Counter[tuple[str, str]]:
    for number in (1, 2):
        folder = root / "HaN-Seg" / "set_1" / f"case_{number:02d}"
        folder.mkdir(parents=True)
        image = SimpleITK.GetImageFromArray(np.zeros((4, SIDE, SIDE), np.int16) + number)
        SimpleITK.WriteImage(image, str(folder / f"case_{number:02d}_IMG_CT.nrrd"))
        for organ in ("Parotid_L", "Eye_AL"):
            labels = np.zeros((4, SIDE, SIDE), np.uint8)
            labels[1:3, 4:9, 4:9] = 1
            path = folder / f"case_{number:02d}_OAR_{organ}.seg.nrrd"
            SimpleITK.WriteImage(SimpleITK.GetImageFromArray(labels), str(path))
    return Counter({(term, "semantic"): 4 for term in ("left parotid gland", "left anterior eyeball segment")})


@pytest.mark.parametrize("name", WRITERS)
def test_an_entry_builds_a_miniature_of_its_set(name: str, tmp_path: Path) -> None:
    wanted = WRITERS[name](tmp_path / "in")
    text = (FOLDER / f"{name}.yaml").read_text()
    if name != "flare22":  # its miniature is large enough to be measured by MedSAM's least sizes
        text = text.replace("slices: {min_area: 100, min_voxels: 1000}", "slices: {}")
    (tmp_path / "spec.yaml").write_text(text)
    result = build(tmp_path / "spec.yaml", tmp_path / "out", root=tmp_path / "in")
    found: Counter[tuple[str, str]] = Counter()
    spec = load_spec(FOLDER / f"{name}.yaml")
    for triplet in _triplets(tmp_path / "out"):
        found.update((target.term, target.kind) for target in triplet.targets)
        found[("", "")] += not triplet.targets
        assert set(triplet.looked_for) <= {target.term for target in spec.targets}
    assert +found == wanted
    assert (
        set(result.manifest["splits"])
        == {
            "medical_sam3": {"train", "validation"},
            "medsam": {"train", "validation", "test"},
            "external": {"external"},
        }[spec.split.kind]
    )


def test_both_eyes_stay_together(tmp_path: Path) -> None:
    WRITERS["papila"](tmp_path / "in")
    build(FOLDER / "papila.yaml", tmp_path / "out", root=tmp_path / "in")
    sides = {name: {t.provenance.patient for t in ShardDataset(tmp_path / "out" / name)} for name in _splits(tmp_path)}
    assert sides["train"].isdisjoint(sides["validation"]) and len(sides["train"] | sides["validation"]) == 7


def _splits(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "out").iterdir() if path.is_dir())


def _triplets(out: Path) -> Iterator[Triplet]:
    for path in sorted(out.iterdir()):
        if path.is_dir():
            yield from ShardDataset(path)
