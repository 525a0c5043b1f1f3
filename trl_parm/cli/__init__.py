# SPDX-License-Identifier: Apache-2.0
"""The console command `trl-parm`: a thin layer over the library, one module for each verb.

Modules here import nothing heavy at their top, so that `--help` answers at once.
"""
