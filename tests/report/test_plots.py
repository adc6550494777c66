import pytest

from composefit.report.plots import Section, read, sections


def outline(found: list[Section]) -> dict[str, dict[str, list[str]]]:
    """Section -> plot -> its metrics."""
    return {
        section.title: {plot.title: [one.metric for one in plot.series] for plot in section.plots}
        for section in found
    }


def legend(*metrics: str) -> dict[str, str]:
    ((plot,),) = (section.plots for section in sections(metrics))
    return {one.metric: one.label for one in plot.series}


@pytest.mark.parametrize(
    "train, validation",
    [
        ("loss", "val_loss"),
        ("train_loss", "val_loss"),
        ("train/loss", "val/loss"),
        ("loss/train", "loss/val"),
        ("training_loss", "validation_loss"),
        ("loss_step", "val_loss_epoch"),
    ],
)
def test_train_and_validation_of_one_quantity_share_a_plot(train: str, validation: str) -> None:
    assert outline(sections([train, validation])) == {"Metrics": {"loss": [train, validation]}}


def test_metrics_are_grouped_by_the_optimizer_in_their_name() -> None:
    metrics = [
        "lr/critic",
        "grad_norm/critic",
        "critic_loss",
        "val_critic_loss",
        "loss/generator",
        "lr/generator",
        "accuracy",
        "samples_per_second",
    ]
    assert outline(sections(metrics, ["critic", "generator"])) == {
        "Metrics": {"accuracy": ["accuracy"]},
        "critic": {
            "loss": ["critic_loss", "val_critic_loss"],
            "learning rate": ["lr/critic"],
            "gradient norm": ["grad_norm/critic"],
        },
        "generator": {"loss": ["loss/generator"], "learning rate": ["lr/generator"]},
        "Speed": {"samples per second": ["samples_per_second"]},
    }


def test_optimizers_are_known_from_what_the_trainer_adds() -> None:
    assert list(outline(sections(["critic_loss", "lr/critic"]))) == ["critic"]
    assert list(outline(sections(["critic_loss"]))) == ["Metrics"]


def test_an_optimizers_name_inside_a_word_is_none() -> None:
    assert read("actor_loss", ["act"]).owner == ""
    assert read("actor_loss", ["act", "actor"]).owner == "actor"
    assert read("a/actor_2/loss", ["actor", "actor_2"]).owner == "actor_2"


def test_losses_that_carry_the_optimizers_names_keep_them() -> None:
    assert outline(sections(["critic", "generator"], ["critic", "generator"])) == {
        "critic": {"critic": ["critic"]},
        "generator": {"generator": ["generator"]},
    }


def test_a_metric_by_itself_keeps_its_whole_name() -> None:
    names = ["val_accuracy", "test_time", "time_per_step", "latest_step"]
    assert list(outline(sections(names))["Metrics"]) == names


def test_the_legend_tells_what_differs() -> None:
    assert legend("loss", "val_loss") == {"loss": "train", "val_loss": "validation"}
    assert legend("loss_step", "loss_epoch") == {
        "loss_step": "per step",
        "loss_epoch": "per epoch",
    }
    assert legend("val_acc/dataloader_idx_0", "val_acc/dataloader_idx_1") == {
        "val_acc/dataloader_idx_0": "validation, loader 0",
        "val_acc/dataloader_idx_1": "validation, loader 1",
    }


def test_a_legend_that_could_be_misread_gives_full_names() -> None:
    (section,) = sections(["critic_loss", "loss/critic"], ["critic"])
    (plot,) = section.plots
    assert [one.label for one in plot.series] == ["critic_loss", "loss/critic"]
    assert legend("loss/train", "train_loss") == {
        "loss/train": "loss/train",
        "train_loss": "train_loss",
    }


@pytest.mark.parametrize("name", ["", "/", "_", "val_", "lr/", "grad_norm/", "_step", "step"])
def test_names_of_hardly_anything_have_a_plot_each(name: str) -> None:
    found = outline(sections([name, "loss"]))
    assert [name] in [metrics for plots in found.values() for metrics in plots.values()]


def test_every_metric_is_in_exactly_one_plot() -> None:
    names = [
        f"{phase}{owner}{quantity}{rate}"
        for phase in ("", "val_", "train/")
        for owner in ("", "critic_", "generator/")
        for quantity in ("loss", "x", "lr")
        for rate in ("", "_step", "_epoch", "/dataloader_idx_3")
    ]
    found = sections(names, ["critic", "generator"])
    shown = [one.metric for section in found for plot in section.plots for one in plot.series]
    assert sorted(shown) == sorted(names)
