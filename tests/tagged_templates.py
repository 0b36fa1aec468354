r"""Real chat templates with `{% generation %}` round what the assistant says: an oracle of spans.

A span begins where the generation prompt would end: the role header and a forced `<think>\n` are
not trained, white space that the prompt does not give is. It ends with the end-of-turn token, or
with the content where the template writes none. Calls of tools are inside, their results are not.
A turn has one span. Where the prompt forces more than the turn holds (a think block that this turn
lacks, or fills), a piece of the prompt that the turn does begin with stays outside.

A replacement holds as little of a template as finds the place, so the text stays that of the file.
"""

from __future__ import annotations

from pathlib import Path

OPEN = "{%- generation %}"
CLOSE = "{%- endgeneration %}"


def spoken(text: str) -> str:
    """Output of an expression, inside a span."""
    return "{% generation %}{{ " + text + " }}{% endgeneration %}"


def spoken_by(role: str, text: str) -> str:
    """Output of an expression, inside a span where the condition on the role holds."""
    return "{% if " + role + " %}" + spoken(text) + "{% else %}{{ " + text + " }}{% endif %}"


def unforced(forced: str, otherwise: str = "''") -> str:
    """Output of the variable `said`, in a span but for what the generation prompt forces on it."""
    return (
        "{% set forced = " + forced + " %}"
        "{% if not said.startswith(forced) %}{% set forced = " + otherwise + " %}{% endif %}"
        "{{ forced }}" + spoken("said[forced | length:]")
    )


# what enable_thinking and its absence force, after the role header
QWEN3_FORCED = unforced(
    r"'<think>\n\n</think>\n\n' if enable_thinking is defined and enable_thinking is false else ''"
)
QWQ_FORCED = unforced(
    r"'<think>\n' if enable_thinking else '<think>\n</think>'",
    otherwise=r"'<think>\n' if said.startswith('<think>\n') else ''",
)
GLM_FORCED = unforced(
    r"'\n<think></think>' if enable_thinking is defined and not enable_thinking else ''"
)

QWEN_ROLE = r"{{- '<|im_start|>' + message.role + '\n' }}"
QWEN_CALLS = r"""{{- '<|im_start|>' + message.role }}
        {%- if message.content"""
QWEN_CALLS_END = r"""{%- endfor %}
        {{- '<|im_end|>\n' }}"""
# the newline of the role header comes with the content, or with the first call
QWEN_CALLS_REPLACED = [
    (QWEN_CALLS, QWEN_CALLS.replace("}}\n", "}}{% set said %}\n")),
    (
        QWEN_CALLS_END,
        r"{%- endfor %}{% endset %}{{ said[:1] }}"
        + spoken("said[1:] + '<|im_end|>'")
        + r"{{- '\n' }}",
    ),
]

LLAMA3_TURN = r"""'<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}"""
LLAMA3_TURN_REPLACED = (
    LLAMA3_TURN,
    r"'<|end_header_id|>\n\n' }}"
    + spoken_by("message['role'] == 'assistant'", "message['content'] | trim + '<|eot_id|>'"),
)

TAGS: dict[str, list[tuple[str, str]]] = {
    "GLM-4.6.jinja": [
        (
            "{%- if loop.index0 > ns.last_user_index and",
            "{%- set said -%}{%- if loop.index0 > ns.last_user_index and",
        ),
        (
            "</tool_call>{% endfor %}\n{% endif %}",
            "</tool_call>{% endfor %}\n{% endif %}{% endset %}" + GLM_FORCED,
        ),
    ],
    "HuggingFaceTB-SmolLM3-3B.jinja": [
        (
            r'"<|im_start|>assistant\n" + content.lstrip("\n") + "<|im_end|>\n" }}',
            r'"<|im_start|>assistant\n" }}'
            + spoken(r'content.lstrip("\n") + "<|im_end|>"')
            + r'{{ "\n" }}',
        ),
        (
            r'"<think>\n\n</think>\n" + content.lstrip("\n") + "<|im_end|>\n" }}',
            r'"<think>\n\n</think>\n" }}'
            + spoken(r'content.lstrip("\n") + "<|im_end|>"')
            + r'{{ "\n" }}',
        ),
    ],
    "Qwen-QwQ-32B.jinja": [
        (
            r"{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}",
            QWEN_ROLE + "{% set said = content + '<|im_end|>' %}" + QWQ_FORCED + r"{{- '\n' }}",
        ),
        QWEN_CALLS_REPLACED[0],
        (
            QWEN_CALLS_END,
            r"{%- endfor %}{{ '<|im_end|>' }}{% endset %}{{ said[:1] }}{% set said = said[1:] %}"
            + QWQ_FORCED
            + r"{{- '\n' }}",
        ),
    ],
    "Qwen-Qwen2.5-7B-Instruct.jinja": [
        (
            r"{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}",
            QWEN_ROLE
            + spoken_by("message.role == 'assistant'", "message.content + '<|im_end|>'")
            + r"{{- '\n' }}",
        ),
        *QWEN_CALLS_REPLACED,
    ],
    "Qwen-Qwen3-0.6B.jinja": [
        (
            "{%- if loop.index0 > ns.last_query_index %}",
            QWEN_ROLE + "{% set said %}{%- if loop.index0 > ns.last_query_index %}",
        ),
        (
            r"{{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content",
            r"{{- '<think>\n' + reasoning_content",
        ),
        (
            r"""            {%- else %}
                {{- '<|im_start|>' + message.role + '\n' + content }}""",
            r"            {%- else %}{{- '' + content }}",
        ),
        (
            r"""{%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}""",
            r"{%- else %}{{- '' + content }}",
        ),
        (
            r"""{%- endif %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}""",
            r"{%- endif %}{{- '<|im_end|>' }}{% endset %}"
            + QWEN3_FORCED
            + r"""{{- '\n' }}
    {%- elif message.role == "tool" %}""",
        ),
    ],
    "Qwen3-Coder.jinja": [
        (
            r"{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}",
            QWEN_ROLE
            + spoken_by("message.role == 'assistant'", "message.content + '<|im_end|>'")
            + r"{{- '\n' }}",
        ),
        *QWEN_CALLS_REPLACED,
    ],
    "SmolLM2-135M-Instruct.jinja": [
        (
            "+ '\n' + message['content'] + '<|im_end|>' + '\n'}}",
            "+ '\n' }}"
            + spoken_by("message['role'] == 'assistant'", "message['content'] + '<|im_end|>'")
            + "{{ '\n'}}",
        ),
    ],
    "axolotl-gemma3.jinja": [
        (
            "{%- if message['content'] is string -%}",
            "{%- set said -%}{%- if message['content'] is string -%}",
        ),
        (
            "{{ '<end_of_turn>\n' }}",
            "{%- endset -%}"
            + spoken_by("role == 'model'", "said + '<end_of_turn>'")
            + "{{ '\n' }}",
        ),
    ],
    "chujiezheng-alpaca.jinja": [
        (
            r"'### Response:\n' + message['content'] | trim + eos_token + '\n\n' }}",
            r"'### Response:\n' }}"
            + spoken("message['content'] | trim + eos_token")
            + r"{{ '\n\n' }}",
        ),
    ],
    "chujiezheng-llama-3-instruct.jinja": [
        (
            r"+ '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}",
            r"+ '<|end_header_id|>\n\n' }}"
            + spoken_by(
                "message['role'] == 'assistant'", "message['content'] | trim + '<|eot_id|>'"
            )
            # a newline after a block would be cut
            + "{{ '' }}",
        ),
    ],
    "deepseek-ai-DeepSeek-V3.1.jinja": [
        (
            "{%- if message['role'] == 'assistant' and message['tool_calls'] -%}\n"
            "    {%- if ns.is_last_user -%}{{'<｜Assistant｜><think></think>'}}",
            "{%- if message['role'] == 'assistant' and message['tool_calls'] -%}\n"
            "    {%- set shut = '</think>' if ns.is_last_user and thinking else '' -%}\n"
            "    {%- if ns.is_last_user -%}{{'<｜Assistant｜><think>'}}"
            "{{- '' if thinking else '</think>' -}}",
        ),
        (
            "{%- for tool in message['tool_calls'] -%}",
            OPEN + "{{- shut -}}{%- for tool in message['tool_calls'] -%}",
        ),
        (
            "{{'<｜tool▁calls▁end｜><｜end▁of▁sentence｜>'}}",
            "{{'<｜tool▁calls▁end｜><｜end▁of▁sentence｜>'}}" + CLOSE,
        ),
        (
            "{%- if ns.is_last_user -%}{{'<｜Assistant｜>'}}\n",
            "{%- set shut = '' -%}{%- if ns.is_last_user -%}{{'<｜Assistant｜>'}}\n",
        ),
        (
            "{%- else -%}{{'<think></think>'}}\n",
            "{%- else -%}{%- set shut = '</think>' if thinking else '' -%}"
            "{{'<think>'}}{{- '' if thinking else '</think>' -}}\n",
        ),
        (
            "{{message['content'] + '<｜end▁of▁sentence｜>'}}",
            spoken("shut + message['content'] + '<｜end▁of▁sentence｜>'"),
        ),
        (
            "{{content + '<｜end▁of▁sentence｜>'}}",
            spoken("shut + content + '<｜end▁of▁sentence｜>'"),
        ),
    ],
    "google-gemma-2-2b-it.jinja": [
        (
            "+ role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}",
            "+ role + '\n' }}"
            + spoken_by("role == 'model'", "message['content'] | trim + '<end_of_turn>'")
            + "{{ '\n' }}",
        ),
    ],
    "hfjs-HuggingFaceH4-zephyr-7b-beta.jinja": [
        (
            "{{ '<|assistant|>\n'  + message['content'] + eos_token }}",
            # a newline after a block would be cut
            "{{ '<|assistant|>\n' }}" + spoken("message['content'] + eos_token") + "{{ '' }}",
        ),
    ],
    "hfjs-deepseek-ai-deepseek-llm-7b-chat.jinja": [
        (
            "{{ 'Assistant: ' + message['content'] + eos_token }}",
            "{{ 'Assistant:' }}" + spoken("' ' + message['content'] + eos_token"),
        ),
    ],
    "hfjs-mistralai-Mistral-7B-Instruct-v0.3.jinja": [
        ("{{- ' [TOOL_CALLS] [' }}", OPEN + "{{- ' [TOOL_CALLS] [' }}"),
        (
            "{{- '] ' }}\n            {{- eos_token }}",
            "{{- '] ' }}\n            {{- eos_token }}" + CLOSE,
        ),
        (
            "{{- ' ' + message.content + ' ' + eos_token}}",
            OPEN + "{{- ' ' + message.content + ' ' + eos_token}}" + CLOSE,
        ),
    ],
    "ibm-granite-granite-3.3-2B-Instruct.jinja": [
        (
            "'<|end_of_role|>' + message['content'] + '<|end_of_text|>\n' }}",
            "'<|end_of_role|>' }}"
            + spoken_by("message['role'] == 'assistant'", "message['content'] + '<|end_of_text|>'")
            + "{{- '\n' }}",
        ),
    ],
    "meta-llama-Llama-3.1-8B-Instruct.jinja": [
        LLAMA3_TURN_REPLACED,
        (
            "{%- if builtin_tools is defined and tool_call.name in builtin_tools %}",
            r"{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}"
            + OPEN
            + "{%- if builtin_tools is defined and tool_call.name in builtin_tools %}",
        ),
        (
            r"""            {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
            {{- "<|python_tag|>" """,
            r"""            {{- "<|python_tag|>" """,
        ),
        (
            r"""            {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
            {{- '{"name": "' """,
            r"""            {{- '{"name": "' """,
        ),
        (
            '        {%- endif %}\n    {%- elif message.role == "tool"',
            "        {%- endif %}" + CLOSE + '\n    {%- elif message.role == "tool"',
        ),
    ],
    "meta-llama-Llama-3.2-3B-Instruct.jinja": [
        LLAMA3_TURN_REPLACED,
        (
            r"""{{- '{"name": "' + tool_call.name""",
            OPEN + r"""{{- '{"name": "' + tool_call.name""",
        ),
        (
            '{{- "<|eot_id|>" }}\n    {%- elif message.role == "tool"',
            '{{- "<|eot_id|>" }}' + CLOSE + '\n    {%- elif message.role == "tool"',
        ),
    ],
    "microsoft-Phi-3.5-mini-instruct.jinja": [
        (
            "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}",
            "{{'<|assistant|>\n'}}" + spoken("message['content'] + '<|end|>'") + "{{'\n'}}",
        ),
    ],
    "mistralrs-llama2.jinja": [
        (
            "{{ ' '  + content.strip() + ' ' + eos_token }}",
            spoken("' '  + content.strip() + ' ' + eos_token"),
        ),
    ],
}


def tagged(folder: Path, name: str) -> str:
    """The text of the template file `name` in `folder`, with its spans tagged.

    Args:
        folder: Where the template files are.
        name: Name of the file, a key of `TAGS`.
    """
    # bytes, as a text read would turn \r\n into \n
    text = (folder / name).read_bytes().decode("utf-8")
    for old, new in TAGS[name]:
        assert text.count(old) == 1, f"{name}: {old!r} is there {text.count(old)} times, not once"
        text = text.replace(old, new)
    return text
