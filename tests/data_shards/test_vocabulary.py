from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

import data_shards
from data_shards.errors import UserError
from data_shards.spec import load_spec
from data_shards.vocabulary import canonical, known, normalise, synonyms, vocabulary

PACKAGE = Path(data_shards.__file__).parent

FLARE22 = (
    "liver, right kidney, spleen, pancreas, aorta, inferior vena cava, right adrenal gland, left adrenal gland, "
    "gallbladder, esophagus, stomach, duodenum, left kidney"
)
ASKED_FOR = (
    "lesion, tumor, polyp, cell nucleus, skin lesion, lung, pneumothorax, retinal blood vessel, optic disc, optic cup, "
    "gland, fetal head, pubic symphysis, thyroid nodule, breast tumor, brachial plexus, tooth, left ventricle, "
    "brain tumor, prostate, plasma cell, mitochondrion, white matter hyperintensity, mediastinal lymph node"
)


def test_one_name_one_concept() -> None:
    names = Counter(name.casefold() for concept, others in vocabulary().synonyms.items() for name in (concept, *others))
    assert [name for name, count in names.items() if count > 1] == []
    assert len(names) > 1000
    # YAML would let the second of two equal keys win in silence.
    lines = re.findall(r"^  (\S[^:]*): \[", (PACKAGE / "vocabulary.yaml").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(lines) == len(set(lines)) == len(vocabulary().synonyms) == sum(map(len, vocabulary().regions.values()))


def test_names_are_as_they_would_be_written() -> None:
    for concept, others in vocabulary().synonyms.items():
        for name in (concept, *others):
            assert isinstance(name, str) and name == normalise(name), name
    british = re.compile(r"tumour|oedema|haem|oesoph|foet|ischaem|\bgrey\b|leuco|\bdisk\b|naev")
    assert [concept for concept in vocabulary().synonyms if british.search(concept)] == []


@pytest.mark.parametrize("terms", [FLARE22, ASKED_FOR])
def test_what_the_vocabulary_must_know(terms: str) -> None:
    assert [term for term in terms.split(", ") if canonical(term) != term or not known(term)] == []


def test_the_classes_of_totalsegmentator_are_known() -> None:
    targets = load_spec(PACKAGE / "catalogue" / "totalsegmentator.yaml").targets
    assert len(targets) == len({target.term for target in targets}) == 117
    for target in targets:
        assert target.name is not None
        assert canonical(target.name.replace("_", " ")) == target.term, target.name
        assert known(target.term)


def test_canonical() -> None:
    assert canonical("  Kidney \n LEFT ") == "left kidney" == canonical("Left kidney")
    assert canonical("brain tumour") == "brain tumor" and canonical("oesophagus") == "esophagus"
    assert canonical("csf") == "cerebrospinal fluid" and canonical("covid-19 Infection") == "COVID-19 infection"
    assert canonical("vertebrae L5") == "vertebra L5" and canonical("iliac vena left") == "left iliac vein"
    assert canonical("left lung") == "left lung" != canonical("lung")
    assert canonical(" Shoe  size") == "Shoe size"  # unknown: the spelling is kept
    assert known("POSTCAVA") and known("inferior vena cava") and not known("shoe size")
    for function in (canonical, known):
        with pytest.raises(UserError, match="a term is empty"):
            function("  ")


def test_synonyms() -> None:
    assert synonyms("urinary bladder", []) == ("bladder",)
    assert synonyms("Liver", ["foie", " Hepar ", "LIVER"]) == ("foie", "Hepar")
    # another name of a concept has the concept among its synonyms, and not itself
    assert synonyms("postcava", ["vena cava"]) == ("vena cava", "inferior vena cava", "IVC")
    assert synonyms("shoe size", ["size of a shoe", "Shoe Size"]) == ("size of a shoe",)


def test_the_file_is_read_once() -> None:
    assert vocabulary() is vocabulary()
