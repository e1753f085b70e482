"""A recipe's job that is done, and whose task's files say something else since, is told."""

from pathlib import Path

from mtllm_engine import recipe
from mtllm_engine.evaluation.predictions import save
from mtllm_engine.recipe import mark_done
from mtllm_engine.tasks import digest_now, load_task, pack_split
from tests.support.predictions import build
from tests.support.recipes import TEXT
from tests.support.stages import write_topics


def test_a_done_job_whose_task_files_changed_since_is_named(tmp_path: Path, capsys):
    write_topics(tmp_path, "eng_Latn", train=4, dev=3)
    source = f"sib200:{tmp_path}/topics"
    text = TEXT.format(folder=tmp_path / "out").replace('"nli"', '"sib200"')
    (tmp_path / "recipe.toml").write_text(text.replace("mnli:data/mnli", source))
    made = recipe.load(tmp_path / "recipe.toml")
    made.folder.mkdir()
    for job in made.jobs:
        mark_done(made, job)
        if job.config.task.train:
            for split in ("train", "validation"):
                out = Path(job.config.run.dir) / "corpus" / split
                pack_split(load_task("sib200"), source, split, "eng_Latn", out)
    assert recipe.run(made) == 0
    assert capsys.readouterr().err == ""
    write_topics(tmp_path, "eng_Latn", seed=7, dev=3)
    assert recipe.run(made) == 0
    jobs = ("finetune-3", "stage2-3", "finetune-4", "stage2-4")
    lines = [
        f"mtllm: warning: {name} is done, but task.validation ({source}) has changed in eng_Latn "
        f"since; remove {made.folder}/{name}.done and its folder to make it anew"
        for name in jobs
    ]
    assert capsys.readouterr().err.splitlines() == lines


def test_a_done_evaluation_whose_test_files_changed_since_is_named(tmp_path: Path, capsys):
    """In the languages that changed."""
    source = f"sib200:{tmp_path}/topics"
    text = TEXT.format(folder=tmp_path / "out").replace('"nli"', '"sib200"')
    text = text.replace("mnli:data/mnli", source).replace("xnli:data/xnli", source)
    (tmp_path / "recipe.toml").write_text(text)
    made = recipe.load(tmp_path / "recipe.toml")
    made.folder.mkdir()
    for job in made.jobs:
        mark_done(made, job)
    for language in ("deu_Latn", "swh_Latn"):
        write_topics(tmp_path, language, test=3)
        digest = digest_now(load_task("sib200"), source, "test", language)
        maker = {"evaluated": "", "checkpoint": "", "settings": {}, "commit": "", "test": digest}
        save(made.results, build("stack", language, 4, dataset="sib200", maker=maker))
    assert recipe.run(made) == 0
    assert capsys.readouterr().err == ""
    write_topics(tmp_path, "swh_Latn", seed=1, test=3)
    assert recipe.run(made) == 0
    (line,) = capsys.readouterr().err.splitlines()
    what = f"evaluate-4 is done, but task.test ({source}) has changed in swh_Latn since; remove "
    assert line.startswith(f"mtllm: warning: {what}")
