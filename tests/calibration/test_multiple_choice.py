import pytest
import torch

import htsr
from htsr.calibration.activations import evaluating
from htsr.calibration.multiple_choice import multiple_choice_accuracy


def test_no_questions_have_no_accuracy():
    with pytest.raises(htsr.UsageError, match="no multiple-choice questions"):
        multiple_choice_accuracy(None, None, [])


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_given_back_after_an_error(training):
    model = torch.nn.Dropout().train(training)
    with pytest.raises(ZeroDivisionError), evaluating(model):
        _ = 1 / int(model.training)
    assert model.training is training
