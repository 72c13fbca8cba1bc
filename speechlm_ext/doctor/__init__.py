"""``speechlm doctor``: what is installed and compiled, whether it fits this machine, and what falls back.

``report.py`` collects and prints the sections, ``driver.py`` finds the NVIDIA driver and its GPUs, ``fit.py`` compares
them with what was compiled, ``fallbacks.py`` names what runs slower than it could.
"""

from speechlm_ext.doctor.report import EXTRAS, SECTIONS, DoctorConfig, collect, format_report, run_doctor

__all__ = ["EXTRAS", "SECTIONS", "DoctorConfig", "collect", "format_report", "run_doctor"]
