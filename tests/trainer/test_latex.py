"""Tables in LaTeX: words of any sign compile with pdflatex, where that is installed, and its own fonts."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from finished_cells import cell, leave

from trainer.ablation.results import collect
from trainer.ablation.spec import load_ablation
from trainer.ablation.tex import write_latex
from trainer.report.latex import escaped, latex_line

needs_latex = pytest.mark.skipif(
    shutil.which("pdflatex") is None,
    reason="no pdflatex: apt-get install --no-install-recommends texlive-latex-base texlive-latex-recommended",
)
HOSTILE = (
    '100% & more_words ~ ^ \\input{x} $x$ #1 {a} [b] <c> |d| *e* `f\' "g" é É ß ø ł ğ ç ñ Å µ μ λ Ω ± ≥ ≤ ≠ × ÷ − – '
    "— … · • ° ² ₃ ½ † ‡ ↓ ↑ → ∞ √ ’ “ ” \u00a0 \u202f 中 🧠 \u200b \t \n \x07 ά Ж"
)


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("5 % of a_b & c", r"5 \% of a\_b \& c"),
        ("\\ ~ ^", r"\textbackslash{} \textasciitilde{} \textasciicircum{}"),
        ("café", r"caf\'{e}"),
        ("cafe\u0301", r"caf\'{e}"),
        ("≥ 3 µm²", r"$\geq$ 3 $\mu$m$^{2}$"),
        ("Δ λ Β", r"$\Delta$ $\lambda$ B"),
        ("a\nb\tc", "a b c"),
        ("中", "[U+4E2D]"),
        ("0.9 [0.8, 0.95]*", "0.9 [0.8, 0.95]$^{*}$"),
    ],
)
def test_words_are_escaped(words: str, shown: str) -> None:
    assert escaped(words) == shown
    assert escaped(words).isascii()


def test_a_bracket_at_the_start_is_no_option_of_the_line_before() -> None:
    assert latex_line(["[0.1]", "b"]) == r"{}[0.1] & b \\"


def compiled(folder: Path, body: str) -> str:
    """What pdflatex says of a document with this body; it takes it without an error."""
    (folder / "all.tex").write_text(
        "\\documentclass{article}\n\\usepackage{booktabs,graphicx}\n\\begin{document}\n" + body + "\n\\end{document}\n"
    )
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "all.tex"]
    done = subprocess.run(command, cwd=folder, capture_output=True, timeout=60, check=False)
    said = done.stdout.decode(errors="replace")
    assert done.returncode == 0, said[-2000:]
    assert (folder / "all.pdf").stat().st_size > 1000
    assert "Missing character" not in said and "undefined" not in said.lower()
    return said


@needs_latex
def test_hostile_words_compile(tmp_path: Path) -> None:
    lines = [latex_line([word, escaped(word)]) for word in [HOSTILE, *HOSTILE.split(" "), "[x]"]]
    rows = "\n".join(lines)
    compiled(tmp_path, f"{escaped(HOSTILE)}\n\n\\begin{{tabular}}{{ll}}\n{rows}\n\\end{{tabular}}")


@needs_latex
def test_every_latin_and_greek_letter_compiles(tmp_path: Path) -> None:
    letters = [chr(code) for code in (*range(0xA1, 0x250), *range(0x370, 0x400), *range(0x2000, 0x2300))]
    compiled(tmp_path, "\n\n".join(escaped(letter) for letter in letters))


@needs_latex
def test_results_of_an_ablation_compile_and_fit_a_page(tmp_path: Path) -> None:
    spec = tmp_path / "a_b%.yaml"
    names = ["full", "lo_ra", "unet", "prompt", "adapter", "déc.µ", "layer-decay", "untouched"]
    listed = "".join(f"  {name}: {'{tuned: false}' if name == 'untouched' else ''}\n" for name in names)
    spec.write_text(f"# 5 % of a_b & \\c?\nbase: b\nbudget: {{steps: 30}}\nseeds: [0, 1]\ncells:\n{listed}")
    cells = [cell(tmp_path, name, seed) for seed in (0, 1) for name in names if seed == 0 or name != "untouched"]
    for one in cells:
        leave(one, ("CT_1", "MR & more", "µ-CT {x}"), ("50%_off~^\\", "[data] #1 中"))
    write_latex(tmp_path / "results.tex", load_ablation(spec), collect(cells, "full"))
    said = compiled(tmp_path, "\\input{results.tex}")
    wide = [line for line in said.splitlines() if line.startswith("Overfull \\hbox")]
    assert not wide, wide


@needs_latex
def test_tables_of_compare_compile(tmp_path: Path, trainer_command) -> None:
    columns = []
    for name, seed in (("SA_M & {co}", 0), ("50% µ~^\\", 1)):
        one = cell(tmp_path, f"full{seed}", seed)
        leave(one, ("CT_1", "MR & more"), ("50%_off~^\\", "[data] #1 é≥±"))
        columns.append(f"{name}={one.run.evaluation('tuned')}")
    code, _, err = trainer_command("compare", *columns, "--by", "dataset", "--out", tmp_path / "out")
    assert code == 0, err
    (tmp_path / "comparison.tex").write_bytes((tmp_path / "out/comparison.tex").read_bytes())
    compiled(tmp_path, "\\input{comparison.tex}")
