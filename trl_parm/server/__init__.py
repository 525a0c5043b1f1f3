# SPDX-License-Identifier: Apache-2.0
"""An HTTP server that speaks OpenAI's API, with a preference for every request: `trl-parm serve`.

From outside in: `command` starts and drains it, `app` knows of HTTP, `protocol` and `answers` of what requests and
answers look like, `preparing` of prompts, `served` of the models that requests name, `engine` of who is decoded when,
`lanes` of texts that are decoded together, and `texts` of one text that is being written.
"""
