"""Every word a user reads is asserted as the user reads it."""

import html
import subprocess
import sys
import unicodedata
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest

from gradwatch import explain
from gradwatch.errors import ConfigError
from gradwatch.explain import did_you_mean, fold, healed, help_for, markdown, render, summary_line
from gradwatch.report import Action, Alert, Cause, Diagnosis, Report, Severity, Site, Status

SITE = Site(
    file="net.py",
    line=12,
    end_line=12,
    column=12,
    end_column=33,
    function="Encoder.forward",
    module="encoder",
    source="        h = self.proj(x).detach()",
)
DETACHED = Diagnosis(
    severity=Severity.WARNING,
    cause=Cause.DETACHED,
    status=Status.MISSING,
    parameters=("encoder.proj.weight", "encoder.proj.bias"),
    site=SITE,
    operation="torch.Tensor.detach",
    notes=("no other use of these parameters reaches the loss",),
    help="remove `.detach()` to train them, or freeze `encoder.proj` with `requires_grad_(False)`",
)
ALERT = Alert(
    rule="disconnected",
    action=Action.ABORT,
    parameters=("a", "b", "c"),
    value=None,
    limit=None,
    steps=10,
    step=9,
    status=Status.MISSING,
)
EXPLODING = Alert("exploding", Action.WARN, ("x",), 1.3e4, 100.0, 3, 1200)


def plain(**changes):
    """Return a diagnosis that takes one line and a pointer, with changes."""
    found = Diagnosis(Severity.WARNING, Cause.UNUSED, Status.MISSING, ("w",))
    return replace(found, **changes)


def heading(subject, names=()):
    """Return the first line of what is rendered."""
    return render(subject, names).partition("\n")[0]


def snippet(**changes):
    """Return the source line and the caret line of a site."""
    lines = render(replace(DETACHED, site=replace(SITE, **changes))).splitlines()
    return lines[3:5]


def width(text):
    """Return the columns that a terminal needs for a text."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


# Suggestions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "expected"),
    [("threshhold", "threshold"), ("acton", "action"), ("zzz", None), ("", None)],
)
def test_suggestion(word, expected):
    """A word is suggested only where it is near enough."""
    assert did_you_mean(word, iter(["threshold", "action"])) == expected


# Folding ------------------------------------------------------------------------------------------------

NAMES = ["embed.weight", "enc.0.a.w", "enc.0.a.b", "enc.0.n.w", "enc.1.a.w", "enc.1.a.b", "scale"]


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        (["enc.0.a.w", "enc.0.a.b"], ("enc.0.a.*",)),
        (["enc.0.a.w", "enc.0.a.b", "enc.0.n.w"], ("enc.0.*",)),
        (["scale", "enc.1.a.w", "enc.1.a.b"], ("scale", "enc.1.*")),
        (["enc.0.a.w", "enc.1.a.w"], ("enc.0.a.w", "enc.1.a.w")),
        (["enc.0.n.w", "embed.weight"], ("enc.0.n.w", "embed.weight")),
        (NAMES[1:6], ("enc.*",)),
        (NAMES, ("embed.weight", "enc.*", "scale")),
        (["other.w", "other.w"], ("other.w",)),
        ([], ()),
    ],
)
def test_fold(parameters, expected):
    """The largest module whose parameters are all there takes their place."""
    assert fold(parameters, NAMES) == expected


def test_fold_without_names():
    """Nothing is folded where the other parameters are not known."""
    assert fold(["a.w", "a.b"], ()) == ("a.w", "a.b")


# Diagnoses ----------------------------------------------------------------------------------------------


def test_detached():
    """A diagnosis has the form of a compiler message, with carets under the expression."""
    assert (
        render(DETACHED)
        == """\
warning[detached]: `encoder.proj.weight` and `encoder.proj.bias` get no gradient
  --> net.py:12 in Encoder.forward (module `encoder`)
   |
12 |         h = self.proj(x).detach()
   |             ^^^^^^^^^^^^^^^^^^^^^ the result has no history
   |
   = note: no other use of these parameters reaches the loss
   = help: remove `.detach()` to train them, or freeze `encoder.proj` with `requires_grad_(False)`
   = more: gradwatch explain detached"""
    )


def test_library_site():
    """The user's own line is shown when a library did it, and the library's place is a note."""
    mine = Site("train.py", 7, 7, 4, 13, "main", None, "    y = helper(x)")
    site = Site("/opt/lib.py", 30, 30, 8, 20, "helper", "net", "    return x.data", caller=mine)

    assert (
        render(replace(DETACHED, site=site, notes=("seen",), help=None))
        == """\
warning[detached]: `encoder.proj.weight` and `encoder.proj.bias` get no gradient
 --> train.py:7 in main (module `net`)
  |
7 |     y = helper(x)
  |     ^^^^^^^^^ the result has no history
  |
  = note: it happens inside this call, at /opt/lib.py:30 in helper: `return x.data`
  = note: seen
  = more: gradwatch explain detached"""
    )


def test_library_site_without_source():
    """A library's place is named alone where its source cannot be read."""
    site = Site("/opt/lib.so", 1, caller=Site("train.py", 7))

    assert (
        render(plain(site=site))
        == """\
warning[unused]: `w` gets no gradient
 --> train.py:7
  = note: it happens inside this call, at /opt/lib.so:1
  = more: gradwatch explain unused"""
    )


def test_no_site():
    """Without a site the notes follow the headline."""
    found = plain(notes=("module `head` did not run",), help="use it")

    assert (
        render(found)
        == """\
warning[unused]: `w` gets no gradient
   = note: module `head` did not run
   = help: use it
   = more: gradwatch explain unused"""
    )


def test_several_lines():
    """An expression over several lines is underlined to the end of its first, and its last is named."""
    source = "        h = self.proj(  # a comment"

    assert snippet(end_line=14, end_column=9, source=source) == [
        "12 |         h = self.proj(  # a comment",
        "   |             ^^^^^^^^^^ ... to line 14: the result has no history",
    ]


def test_several_lines_without_label():
    """The last line is named also where the cause has no label."""
    site = replace(SITE, end_line=14, source="        h = proj(")

    assert render(plain(site=site)).splitlines()[4] == "   |             ^^^^^ ... to line 14"


@pytest.mark.parametrize(
    ("source", "before", "under"),
    [
        ("\th = x.detach()", "\th = ", "x.detach()"),
        ("h\t=\tx.detach() + y", "h\t=\t", "x.detach()"),
        ("名 = '漢字', x.detach('漢')", "名 = '漢字', ", "x.detach('漢')"),
        ("e\u0301 = x.detach()", "e\u0301 = ", "x.detach()"),
        ("'a\u200db', x.detach()", "'a\u200db', ", "x.detach()"),
        ("'\x1b', x.detach()", "'\x1b', ", "x.detach()"),
    ],
)
def test_carets(source, before, under):
    """Carets stand under the expression, whatever the width of what is before and in it."""
    column = len(before)

    shown, marked = snippet(column=column, end_column=column + len(under), source=source)

    start = shown.index("x.detach")
    lead = width(shown[:start].replace("\u0301", ""))
    assert marked == f"   | {' ' * (lead - 5)}{'^' * width(under)} the result has no history"
    assert "\t" not in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize(
    ("columns", "carets"),
    [
        ((None, None), "        ^^^^^^^^^^^^^^^^^^^^^^^^^"),
        ((12, None), "            ^^^^^^^^^^^^^^^^^^^^^"),
        ((12, 12), "            ^"),
        ((12, 999), "            ^^^^^^^^^^^^^^^^^^^^^"),
        ((999, 1000), f"{' ' * 32}^"),
    ],
)
def test_columns_that_do_not_fit(columns, carets):
    """Columns that are missing or lie outside the line still give carets within it."""
    shown = snippet(column=columns[0], end_column=columns[1])

    assert shown[1] == f"   | {carets} the result has no history"


def test_unfinished_source():
    """A line that no tokenizer takes is underlined to its end."""
    source = "        h = '''begin"

    assert snippet(end_line=14, source=source)[1].count("^") == len("'''begin")


def test_comment_alone():
    """A line that is only a comment is underlined as a whole."""
    assert snippet(column=0, end_line=14, source="# note")[1].count("^") == len("# note")


def test_paths(tmp_path, monkeypatch):
    """Places under the current folder are relative to it, others are as they are."""
    monkeypatch.chdir(tmp_path)
    inside, outside = str(tmp_path / "a" / "net.py"), str(tmp_path.parent / "net.py")

    places = [
        render(plain(site=Site(file, 3, function=function))).splitlines()[1]
        for file, function in [(inside, "<module>"), (outside, "f.<locals>.g"), ("<stdin>", None)]
    ]

    assert places == [
        f" --> {Path('a') / 'net.py'}:3",
        f" --> {outside}:3 in g",
        " --> <stdin>:3",
    ]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "`w` gets no gradient"),
        ({"parameters": ("a", "b")}, "`a` and `b` get no gradient"),
        ({"parameters": ("a", "b", "c")}, "`a`, `b`, and `c` get no gradient"),
        ({"parameters": tuple("abcde")}, "`a`, `b`, `c`, and 2 more get no gradient"),
        ({"parameters": ()}, "no parameters get no gradient"),
        ({"cause": Cause.NOT_IN_OPTIMIZER}, "`w` is in no optimizer"),
        (
            {"cause": Cause.NOT_IN_OPTIMIZER, "parameters": ("a", "b"), "status": Status.OK},
            "`a` and `b` are in no optimizer",
        ),
        ({"status": Status.ZERO}, "`w` gets a gradient of zero"),
        ({"status": Status.NONFINITE}, "`w` gets a gradient with NaN or infinity"),
        ({"status": Status.FROZEN}, "`w` is frozen"),
        ({"status": Status.UNSEEN}, "`w` cannot be seen"),
        ({"status": Status.OK}, "`w` gets a gradient"),
        ({"cause": Cause.UNDETERMINED}, "`w` gets no gradient, and the cause was not found"),
        ({"parameters": ("a\n\x1b[2Kb",)}, "`a\\n\\x1b[2Kb` gets no gradient"),
    ],
)
def test_headline(changes, expected):
    """A headline states one fact, in the number that fits."""
    assert heading(plain(**changes)).partition(": ")[2] == expected


def test_headline_folds():
    """A module whose parameters are all named stands for them, in the plural."""
    assert heading(DETACHED, [*DETACHED.parameters, "head.weight"]) == (
        "warning[detached]: `encoder.*` get no gradient"
    )


@pytest.mark.parametrize(
    ("cause", "operation", "label"),
    [
        (Cause.NOT_IN_LOSS, None, "the result does not reach the loss"),
        (Cause.NO_GRAD, None, "runs with gradient mode off"),
        (Cause.LEFT_TORCH, "torch.Tensor.item", "the value leaves torch here"),
        (Cause.NON_DIFFERENTIABLE, "torch.argmax", "`argmax` has no derivative"),
        (Cause.NON_DIFFERENTIABLE, "torch.Tensor.__gt__", "a comparison has no derivative"),
        (Cause.NON_DIFFERENTIABLE, None, "this has no derivative"),
        (Cause.CUSTOM_FUNCTION, None, "no gradient comes back through this Function"),
        (Cause.REENTRANT_CHECKPOINT, None, "no input of the checkpoint requires grad"),
        (Cause.CLEARED, None, "the gradient is thrown away here"),
        (Cause.NOT_REQUESTED, None, "this call does not ask for it"),
        (Cause.REPLACED, None, "another tensor is used here"),
        (Cause.ZERO_GRADIENT, None, "the gradient becomes zero here"),
        (Cause.NONFINITE_GRADIENT, None, "the gradient becomes NaN or infinite here"),
        (Cause.UNUSED, None, ""),
    ],
)
def test_label(cause, operation, label):
    """The words behind the carets say what happens there."""
    marked = render(replace(DETACHED, cause=cause, operation=operation)).splitlines()[4]

    assert marked == f"   |             {'^' * 21} {label}".rstrip()


@pytest.mark.parametrize("before", [10, 300, 1000])
def test_a_very_long_line_is_shown_around_the_expression(before):
    """Of a line as long as a page the part with the expression is shown, the carets under it."""
    source = f"f({'a' * before}.detach(){'b' * 400})"
    end = 2 + before + len(".detach()")

    def marked(column):
        site = Site("net.py", 7, column=column, end_column=end, source=source)
        line, carets = render(replace(DETACHED, site=site)).splitlines()[3:5]
        assert len(line) <= len("7 | ") + 160 + len("......")
        return line[carets.index("^") : carets.rindex("^") + 1]

    assert marked(2 + before) == ".detach()"
    assert marked(2).startswith("aaa")


@pytest.mark.parametrize(
    ("source", "is_written"),
    [
        ("out.data.copy_(h)", True),
        ("self.weight.data += b @ a", True),
        ("self.weight.data[0] = h", True),
        ("h = self.weight.data * 2", False),
        ("if self.weight.data == h:", False),
    ],
)
def test_what_is_written_through_data_is_not_helped_by_its_removal(source, is_written):
    """To remove `.data` from a write would leave an error, or zeros: the help is to use the result."""
    site = Site("net.py", 7, column=0, end_column=9, source=source)
    advice = help_for(Cause.DETACHED, "torch.Tensor.data", ["w"], site) or ""

    assert advice.startswith("use the result itself") == is_written


def test_notes_of_several_lines():
    """The further lines of a note are indented, and nothing in it reaches the terminal raw."""
    found = plain(notes=("one\n\x1btwo",))

    assert render(found).splitlines()[1:3] == ["   = note: one", "     \\x1btwo"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "note[unused]: `w` gets a gradient since step 12"),
        (
            {"parameters": ("a", "b")},
            "note[unused]: `a` and `b` get a gradient since step 12",
        ),
        (
            {"cause": Cause.NOT_IN_OPTIMIZER},
            "note[not_in_optimizer]: `w` is in an optimizer since step 12",
        ),
        (
            {"cause": Cause.FROZEN, "status": Status.FROZEN},
            "note[frozen]: `w` is no longer frozen since step 12",
        ),
        ({"status": Status.OK}, "note[unused]: `w` trains since step 12"),
    ],
)
def test_healed(changes, expected):
    """That something healed is said in one line."""
    assert healed(plain(healed_at=12, **changes)) == expected


# Alerts and reports -------------------------------------------------------------------------------------


def test_alert():
    """An alert says what held for how long, and what follows."""
    assert (
        render(ALERT)
        == """\
error[disconnected]: `a`, `b`, and `c` got no gradient for 10 steps in a row
   = note: fired in step 9, the last of 10 in a row
   = note: training ends before the optimizer writes"""
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "warning[exploding]: grad norm of `x` is 1.3e+04, above 1.0e+02"),
        ({"action": Action.LOG}, "note[exploding]: grad norm of `x` is 1.3e+04, above 1.0e+02"),
        ({"value": 1e-9}, "warning[exploding]: grad norm of `x` is 1.0e-09, below 1.0e+02"),
        (
            {"parameters": ("x", "y")},
            "warning[exploding]: grad norm of `x` and `y` is up to 1.3e+04, above 1.0e+02",
        ),
        (
            {"parameters": ("x", "y"), "value": 1e-9},
            "warning[exploding]: grad norm of `x` and `y` is down to 1.0e-09, below 1.0e+02",
        ),
        ({"parameters": ()}, "warning[exploding]: total grad norm is up to 1.3e+04, above 1.0e+02"),
        ({"value": None}, "warning[exploding]: the rule fired for `x`"),
        ({"message": "`x` is meant to be frozen"}, "warning[exploding]: `x` is meant to be frozen"),
        (
            {"status": Status.NONFINITE, "steps": 1},
            "warning[exploding]: `x` got a gradient with NaN or infinity in step 1200",
        ),
    ],
)
def test_alert_headline(changes, expected):
    """An alert's headline gives the number with its limit, or the status with its length."""
    assert heading(replace(EXPLODING, **changes)) == expected


def test_stop():
    """An alert that stops the run says so, and one step is no row."""
    assert (
        render(replace(EXPLODING, action=Action.STOP, steps=1))
        == """\
warning[exploding]: grad norm of `x` is 1.3e+04, above 1.0e+02
   = note: fired in step 1200
   = note: training ends after this step"""
    )


def test_report():
    """A report is its diagnoses and then its alerts, with whole modules folded."""
    report = Report(
        step=9,
        statuses=dict.fromkeys([*DETACHED.parameters, "head.weight"], Status.MISSING),
        diagnoses=(DETACHED, plain()),
        alerts=(ALERT,),
    )
    names = tuple(report.statuses)

    assert render(report).split("\n\n") == [render(DETACHED, names), render(plain()), render(ALERT)]
    assert render(Report(step=0)) == ""


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ("mm f oooo", "2 parameters get no gradient, 1 frozen, 4 train"),
        ("m", "1 parameter gets no gradient"),
        (
            "n zz uu o",
            (
                "1 parameter gets a gradient with NaN or infinity, 2 get a gradient of zero, "
                "2 cannot be seen, 1 trains"
            ),
        ),
        ("ff", "2 parameters are frozen"),
        ("ooo", "3 parameters train"),
        ("", "no parameters"),
    ],
)
def test_summary_line(statuses, expected):
    """The summary counts each status, the worst first."""
    known = {status.value[0]: status for status in Status}
    listed = statuses.replace(" ", "")
    report = Report(step=0, statuses={f"p{i}": known[char] for i, char in enumerate(listed)})

    assert summary_line(report) == expected


# Help and pages -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cause", "operation", "parameters", "expected"),
    [
        (
            Cause.DETACHED,
            "torch.Tensor.data.__get__",
            ["a.w"],
            "remove `.data` to train it, or freeze `a.w` with `requires_grad_(False)`",
        ),
        (
            Cause.DETACHED,
            None,
            ["a.w", "b.w"],
            "remove this call to train them, or freeze them with `requires_grad_(False)`",
        ),
        (
            Cause.LEFT_TORCH,
            "torch.Tensor.__float__",
            ["w", "v"],
            (
                "go on with the tensor itself in place of `float`, or freeze them with "
                "`requires_grad_(False)`"
            ),
        ),
        (
            Cause.NON_DIFFERENTIABLE,
            "torch.bucketize",
            ["a.w", "a.b"],
            (
                "use a differentiable operation in place of `bucketize`, or freeze `a` with "
                "`requires_grad_(False)`"
            ),
        ),
        (
            Cause.NON_DIFFERENTIABLE,
            "torch.argmax",
            ["w"],
            "use `softmax` of the scores as weights, so that the choice stays in the loss",
        ),
        (
            Cause.NONFINITE_GRADIENT,
            "torch.sqrt",
            ["w"],
            "keep the input of `sqrt` away from 0, for example with `clamp(min=1e-8)`",
        ),
        (
            Cause.LEFT_TORCH,
            "torch.Tensor.__float__",
            ["m.w"],
            (
                "go on with the tensor itself in place of `float`, or freeze `m.w` with "
                "`requires_grad_(False)`"
            ),
        ),
        (
            Cause.DETACHED,
            "torch.Tensor.detach_",
            ["w"],
            "remove `.detach_()` to train it, or freeze `w` with `requires_grad_(False)`",
        ),
        (Cause.UNDETERMINED, None, ["w"], None),
    ],
)
def test_help(cause, operation, parameters, expected):
    """The help names the operation to change and the parameters it is about."""
    assert help_for(cause, operation, parameters, Site("net.py", 3)) == expected


def test_help_names_no_operation_that_the_user_did_not_write():
    """Where a call makes the operation inside of itself, the call is named, and not the operation."""
    there = Site("net.py", 3, source="        h = self.base(x).detach()")
    inside = Site("net.py", 3, source="        h = load(self.base.state_dict())")
    wrapped = Site("net.py", 3, source="        h = nn.Embedding.from_pretrained(h)")

    texts = [
        help_for(Cause.DETACHED, "torch.Tensor.detach", ["w"], there),
        help_for(Cause.DETACHED, "torch.Tensor.detach", ["w"], inside),
        help_for(Cause.DETACHED, "torch.nn.Parameter", ["w"], wrapped),
        help_for(Cause.LEFT_TORCH, "torch.Tensor.__float__", ["w"], inside),
    ]
    freeze = "or freeze `w` with `requires_grad_(False)`"
    hidden = f"this call drops the history of the value: use the value itself to train it, {freeze}"
    assert texts == [
        f"remove `.detach()` to train it, {freeze}",
        hidden,
        hidden,
        f"go on with the tensor itself in place of this call, {freeze}",
    ]


def test_help_for_every_cause():
    """Every cause but the unknown one has a help of one line, without a place to fill left over."""
    helps = {cause: help_for(cause, parameters=["a.w"]) for cause in Cause}

    assert [cause for cause, text in helps.items() if text is None] == [Cause.UNDETERMINED]
    assert [text for text in helps.values() if text and ("{" in text or "\n" in text)] == []


def test_page(tmp_path, monkeypatch):
    """A cause is explained by its page."""
    (tmp_path / "causes").mkdir()
    (tmp_path / "causes" / "detached.md").write_text("# detached\n", encoding="utf-8")
    monkeypatch.setattr(resources, "files", lambda _: tmp_path)

    assert explain.explain("detached") == "# detached\n"
    assert explain.explain(Cause.UNUSED) == (
        "unused: No operation of the forward pass read the parameter.\n"
    )


def test_every_cause_has_a_summary(tmp_path, monkeypatch):
    """Every cause is explained in one line where no page is installed."""
    monkeypatch.setattr(resources, "files", lambda _: tmp_path)

    assert [explain.explain(cause).partition(":")[0] for cause in Cause] == list(Cause)


def test_unknown_cause():
    """An unknown cause is answered with the nearest name, or with all of them."""
    with pytest.raises(ConfigError, match=r"unknown cause `detach`: did you mean `detached`\?"):
        explain.explain("detach")
    with pytest.raises(ValueError, match="unknown cause `zzz`: the causes are `cleared`, `custom_"):
        explain.explain("zzz")


# Markdown -----------------------------------------------------------------------------------------------


def test_markdown():
    """The markdown report has the counts, the findings, the alerts, and each finding in full."""
    newer = plain(step=5)
    gone = plain(parameters=("v",), step=7, healed_at=9)

    text = markdown([gone, DETACHED, newer], {"w": Status.MISSING}, 12, [EXPLODING])

    assert text == "\n\n".join(
        [
            "## GradWatch, step 12",
            "**1 parameter gets no gradient**",
            "### Findings (3)",
            (
                "| Severity | Cause | Parameters | Place | Since |\n|---|---|---|---|---|\n"
                "| warning | unused | w | not one line | step 5 |\n"
                "| warning | detached | encoder.proj.weight and encoder.proj.bias "
                "| net.py:12 in Encoder.forward | step 0 |\n"
                "| warning | unused | v | not one line | step 7, healed at step 9 |"
            ),
            "### Alerts (1)",
            (
                "| Severity | Rule | What | Step |\n|---|---|---|---|\n"
                "| warning | exploding | grad norm of x is 1.3e&#43;04, above 1.0e&#43;02 | 1200 |"
            ),
            f"```\n{render(newer)}\n```",
            f"```\n{render(DETACHED)}\n```",
            f"```\n{render(gone)}\n```",
        ]
    )


def test_markdown_of_a_healthy_run():
    """Where nothing was found the markdown report says so."""
    assert markdown([], {"w": Status.OK}, 7).splitlines()[-1] == "No problem found."
    assert "No problem" not in markdown([], {"w": Status.OK}, 7, [EXPLODING])


@pytest.mark.filterwarnings("ignore:html5lib's sanitizer:DeprecationWarning")
def test_markdown_of_hostile_names():
    """No name breaks out of a table cell or a fence, or becomes HTML or emphasis."""
    plugin_util = pytest.importorskip("tensorboard.plugin_util")
    names = ("<img src=x onerror=alert(1)>", "a|b", "__c``` d__")
    found = plain(parameters=names, notes=("```", "````"))

    page = plugin_util.markdown_to_safe_html(markdown([found], {}, 0))

    assert page.count("<td>") == 5
    assert page.count("<pre>") == 1
    assert "<img" not in page
    assert "<strong>no parameters</strong>" in page
    assert "<td><img src=x onerror=alert(1)>, a|b, and __c d" in html.unescape(page)


def test_markdown_is_bounded():
    """At most fifty findings and alerts are shown, and the rest is counted."""
    text = markdown([plain(step=step) for step in range(60)], {}, 60, [EXPLODING] * 60)

    assert text.count("| warning | unused |") == 50
    assert text.count("| warning | exploding |") == 50
    assert text.endswith("10 more findings are not shown.")


def test_no_torch():
    """Rendering needs neither torch nor rich."""
    code = "import sys, gradwatch.explain; print({'torch', 'rich'} & set(sys.modules))"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603 -- our own line

    assert done.stdout.strip() == "set()"


def test_current_folder_is_gone(monkeypatch):
    """A place is shown as it is where there is no current folder."""

    def gone():
        raise FileNotFoundError

    monkeypatch.setattr(Path, "cwd", gone)

    assert render(plain(site=Site("/a/net.py", 3))).splitlines()[1] == " --> /a/net.py:3"
