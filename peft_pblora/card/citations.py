# SPDX-License-Identifier: Apache-2.0
"""BibTeX of the papers whose methods an adapter and its training use."""

CITATIONS = {
    "parm": """\
@inproceedings{lin2025parm,
  title     = {{PARM}: Multi-Objective Test-Time Alignment via Preference-Aware Autoregressive Reward Model},
  author    = {Lin, Baijiong and Jiang, Weisen and Xu, Yuancheng and Chen, Hao and Chen, Ying-Cong},
  booktitle = {International Conference on Machine Learning},
  year      = {2025},
}""",
    "genarm": """\
@inproceedings{xu2025genarm,
  title     = {{GenARM}: Reward Guided Generation with Autoregressive Reward Model for Test-Time Alignment},
  author    = {Xu, Yuancheng and Sehwag, Udari Madhushani and Koppel, Alec and Zhu, Sicheng and An, Bang and
               Huang, Furong and Ganesh, Sumitra},
  booktitle = {International Conference on Learning Representations},
  year      = {2025},
}""",
    "panacea": """\
@inproceedings{zhong2024panacea,
  title     = {Panacea: {Pareto} Alignment via Preference Adaptation for {LLMs}},
  author    = {Zhong, Yifan and Ma, Chengdong and Zhang, Xiaoyuan and Yang, Ziran and Chen, Haojun and
               Zhang, Qingfu and Qi, Siyuan and Yang, Yaodong},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2024},
}""",
    "uniarm": """\
@misc{uniarm2026,
  title         = {{UniARM}: Towards a Unified Autoregressive Reward Model for Multi-Objective Test-Time Alignment},
  author        = {Xie, Hongyan and Ban, Yikun and Fang, Ruiyu and Huang, Zixuan and Wang, Deqing and Li, Jianxin and
                   Yao, Yitong and Wang, Chao and Song, Shuangyong},
  eprint        = {2602.09538},
  archivePrefix = {arXiv},
  year          = {2026},
}""",
    "mo_odpo": """\
@misc{gupta2025moodpo,
  title         = {Robust Multi-Objective Preference Alignment with Online {DPO}},
  author        = {Gupta, Raghav and Sullivan, Ryan and Li, Yunxuan and Phatale, Samrat and Rastogi, Abhinav},
  eprint        = {2503.00295},
  archivePrefix = {arXiv},
  year          = {2025},
}""",
}
"""Name of a paper, as a card's facts hold it → its BibTeX."""
ADAPTER_PAPERS = {"PBLORA": "parm", "SVDLORA": "panacea", "MOSLORA": "uniarm"}
"""Method of an adapter → its paper."""
