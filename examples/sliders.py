# SPDX-License-Identifier: Apache-2.0
"""A page with a slider for each objective, whose answers come from `trl-parm serve`: any client of OpenAI's API does.

trl-parm serve --model_name_or_path runs/models/smollm2-135m-instruct --arm runs/demo/arm
python examples/sliders.py
"""

import os

import gradio as gr
from openai import OpenAI


os.environ.setdefault("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
os.environ.setdefault("OPENAI_API_KEY", "none")
client = OpenAI()
objectives = client.models.list().data[0].objectives


def answer(question: str, *weights: float):
    chat, α = [{"role": "user", "content": question}], [weight / (sum(weights) or 1) for weight in weights]
    chunks = client.chat.completions.create(model="parm", messages=chat, stream=True, extra_body={"preference": α})
    text = ""
    for chunk in chunks:
        yield (text := text + (chunk.choices[0].delta.content or ""))


if __name__ == "__main__":
    sliders = [gr.Slider(0, 1, 0.5, label=objective) for objective in objectives]
    gr.Interface(answer, [gr.Textbox(label="Question"), *sliders], gr.Textbox(label="Answer")).launch()
