# SPDX-License-Identifier: Apache-2.0
"""vLLM's own OpenAI server, whose requests have preferences: `trl-parm serve --engine vllm`.

`command` starts it, `middleware` reads preferences from requests, `exports` makes LoRAs of them as they come, and
`client` is the engine to the server: it decodes a guided request as a family of coupled ones (see `trl_parm.serving`).
"""
