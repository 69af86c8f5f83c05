"""What judges are asked, word for word: another wording makes another score.

Sources: llava/eval/table/rule.json and eval_gpt_review_{bench,visual}.py of haotian-liu/LLaVA (commit c121f04);
mm-vet_evaluator.py of yuweihao/MM-Vet; lmms_eval/tasks/mmvet/utils.py of lmms-eval 0.7.3.
"""

from __future__ import annotations

REVIEWER = "You are a helpful and precise assistant for checking the quality of the answer."
REVIEW_ROLE = "Assistant"

_DESCRIBED = "a few sentences describing the image"
_WITH_BOXES = (
    "five descriptive sentences describing the same image and the bounding box coordinates of each object in the "
    "scene. These coordinates are in the form of bounding boxes, represented as (x1, y1, x2, y2) with floating "
    "numbers ranging from 0 to 1. These values correspond to the top left x, top left y, bottom right x, and "
    "bottom right y"
)


def _review(content: str) -> str:
    return (
        "We would like to request your feedback on the performance of two AI assistants in response to the user "
        "question displayed above. The user asks the question on observing an image. For your reference, the "
        f"visual content in the image is represented with {content}. \n"
        "Please rate the helpfulness, relevance, accuracy, level of details of their responses. Each assistant "
        "receives an overall score on a scale of 1 to 10, where a higher score indicates better overall performance.\n"
        "Please first output a single line containing only two values indicating the scores for Assistant 1 and 2, "
        "respectively. The two scores are separated by a space.\n"
        "In the subsequent line, please provide a comprehensive explanation of your evaluation, avoiding any potential "
        "bias and ensuring that the order in which the responses were presented does not affect your judgment."
    )


_KINDS = ("conv", "detail", "complex")
# category of a question -> what the judge is asked: qa90's by their names, LLaVA-Bench-in-the-Wild's with a prefix
REVIEW_RULES: dict[str, str] = {
    **{kind: _review(_WITH_BOXES) for kind in _KINDS},
    **{f"llava_bench_{kind}": _review(_DESCRIBED) for kind in _KINDS},
}

_GRADE = (
    "Compare the ground truth and prediction from AI models, to give a correctness score for the prediction. <AND> "
    "in the ground truth means it is totally right only when all elements in the ground truth are present in the "
    "prediction, and <OR> means it is totally right when any one element in the ground truth is present in the "
    "prediction. The correctness score is 0.0 (totally wrong), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, or 1.0 "
    "(totally right). Just complete the last space of the correctness score.\n"
)
_EQUATION = "What is x in the equation? | -1 <AND> -5 |"
_MEME = (
    "Can you explain this meme? | This meme is poking fun at the fact that the names of the countries Iceland and "
    "Greenland are misleading. Despite its name, Iceland is known for its beautiful green landscapes, while "
    "Greenland is mostly covered in ice and snow. The meme is saying that the person has trust issues because the "
    "names of these countries do not accurately represent their landscapes. |"
)
_EXAMPLES = f"""--- | --- | --- | ---
{_EQUATION} x = 3 | 0.0
{_EQUATION} x = -1 | 0.5
{_EQUATION} x = -5 | 0.5
{_EQUATION} x = -5 or 5 | 0.5
{_EQUATION} x = -1 or x = -5 | 1.0
""" + (
    f"{_MEME} The meme talks about Iceland and Greenland. It's pointing out that despite their names, Iceland is "
    "not very icy and Greenland isn't very green. | 0.4\n"
    f"{_MEME} The meme is using humor to point out the misleading nature of Iceland's and Greenland's names. Iceland, "
    "despite its name, has lush green landscapes while Greenland is mostly covered in ice and snow. The text 'This "
    "is why I have trust issues' is a playful way to suggest that these contradictions can lead to distrust or "
    "confusion. The humor in this meme is derived from the unexpected contrast between the names of the countries "
    "and their actual physical characteristics. | 1.0\n"
)
MM_VET = f"{_GRADE}\nQuestion | Ground truth | Prediction | Correctness\n{_EXAMPLES}"
# lmms-eval's lacks an empty line, and the name of a variable of its program has got into the first column.
MM_VET_LMMS = f"{_GRADE}gpt_query_prompt | Ground truth | Prediction | Correctness\n{_EXAMPLES}"
# Added by MM-Vet's script after a reply that is not a number.
MM_VET_AGAIN = "\nPredict the correctness of the answer (digit): "
