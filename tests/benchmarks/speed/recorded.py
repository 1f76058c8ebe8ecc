"""Text in the formats that Jetson's tools print (values made up; layouts of JetPack 4, 5 and 6)."""

from __future__ import annotations

#: JetPack 4 on AGX Xavier: no unit after the numbers.
XAVIER_4 = (
    "RAM 2594/31920MB (lfb 5948x4MB) SWAP 0/15960MB (cached 0MB) "
    "CPU [3%@1190,2%@1190,off,off,0%@1190,1%@1190,off,off] EMC_FREQ 0%@2133 GR3D_FREQ 45%@1377 VIC_FREQ 0%@601 "
    "APE 150 MTS fg 0% bg 0% AO@33C GPU@35.5C Tboard@33C Tdiode@35.5C AUX@32.5C CPU@33.5C thermal@33.2C PMIC@50C "
    "GPU 4310/4200 CPU 466/470 SOC 932/930 CV 0/0 VDDRQ 155/150 SYS5V 1689/1690"
)
#: JetPack 5 on AGX Xavier.
XAVIER_5 = (
    "11-02-2023 10:15:12 RAM 4021/30990MB (lfb 4x4MB) SWAP 0/15495MB (cached 0MB) "
    "CPU [12%@2265,2%@2265,0%@2265,0%@2265,0%@2265,0%@2265,0%@2265,0%@2265] EMC_FREQ 3%@2133 GR3D_FREQ 97%@[1377] "
    "VIC_FREQ 115 APE 150 AUX@41C CPU@42.5C thermal@41.9C Tboard@39C AO@40.5C GPU@44C Tdiode@43.5C PMIC@50C "
    "GPU 9184mW/8021mW CPU 1530mW/1500mW SOC 2448mW/2440mW CV 0mW/0mW VDDRQ 1376mW/1300mW SYS5V 2640mW/2600mW"
)
#: JetPack 5 and 6 on AGX Orin.
ORIN = (
    "07-19-2023 10:15:12 RAM 3052/30592MB (lfb 6402x4MB) SWAP 0/15296MB (cached 0MB) "
    "CPU [1%@729,0%@729,off,off,0%@2201,0%@729,0%@729,0%@729,off,off,off,off] EMC_FREQ 0%@2133 "
    "GR3D_FREQ 61%@[1300,1300] VIC_FREQ 729 APE 174 CV0@-256C CPU@45.968C Tboard@34C SOC2@42.593C Tdiode@35C "
    "SOC0@42.468C CV1@-256C GPU@44.1C tj@45.968C SOC1@41.375C CV2@-256C VDD_GPU_SOC 5199mW/4800mW "
    "VDD_CPU_CV 799mW/700mW VIN_SYS_5V0 3035mW/3035mW NC 0mW/0mW VDDQ_VDD2_1V8AO 403mW/403mW NC 0mW/0mW"
)
#: JetPack 6 on Orin Nano: one rail for the whole module.
ORIN_NANO = (
    "03-04-2024 09:00:01 RAM 1903/7620MB (lfb 3x4MB) SWAP 0/3810MB (cached 0MB) "
    "CPU [5%@1510,4%@1510,3%@1510,2%@1510,1%@1510,0%@1510] EMC_FREQ 0%@2133 GR3D_FREQ 12%@[624] NVDEC off NVJPG off "
    "VIC off OFA off APE 200 cpu@48.2C soc2@47.5C soc0@47.9C gpu@48.7C tj@48.7C soc1@48.1C "
    "VDD_IN 4567mW/4500mW VDD_CPU_GPU_CV 1200mW/1100mW VDD_SOC 1400mW/1400mW"
)

NVPMODEL_XAVIER = "NV Fan Mode:quiet\nNV Power Mode: MAXN\n0\n"
NVPMODEL_ORIN = "NV Power Mode: MODE_30W\n2\n"

CLOCKS_XAVIER = """SOC family:tegra194  Machine:Jetson-AGX
Online CPUs: 0-7
cpu0: Online=1 Governor=schedutil MinFreq=2265600 MaxFreq=2265600 CurrentFreq=2265600 IdleStates: C1=0 c6=0
cpu1: Online=1 Governor=schedutil MinFreq=2265600 MaxFreq=2265600 CurrentFreq=2265600 IdleStates: C1=0 c6=0
GPU MinFreq=1377000000 MaxFreq=1377000000 CurrentFreq=1377000000
EMC MinFreq=204000000 MaxFreq=2133000000 CurrentFreq=2133000000 FreqOverride=1
Fan: PWM=77
NV Power Mode: MAXN
"""
CLOCKS_ORIN = """SOC family:tegra234  Machine:Jetson AGX Orin Developer Kit
Online CPUs: 0-1
cpu0: Online=1 Governor=schedutil MinFreq=729600 MaxFreq=2201600 CurrentFreq=1113600 IdleStates: WFI=1 c7=1
cpu1: Online=0 Governor=schedutil MinFreq=729600 MaxFreq=2201600 CurrentFreq=729600 IdleStates: WFI=1 c7=1
GPU MinFreq=306000000 MaxFreq=1300500000 CurrentFreq=306000000
EMC MinFreq=204000000 MaxFreq=3199000000 CurrentFreq=2133000000 FreqOverride=0
FAN Dynamic Speed control=active hwmon1_pwm1=55
NV Power Mode: MODE_30W
"""

RELEASE_XAVIER = (
    "# R35 (release), REVISION: 4.1, GCID: 33958178, BOARD: t186ref, EABI: aarch64, DATE: Tue Aug  1 19:57:35 2023\n"
)
RELEASE_ORIN = (
    "# R36 (release), REVISION: 4.0, GCID: 37537400, BOARD: generic, EABI: aarch64, DATE: Fri Sep 13 04:36:44 2024\n"
)

#: jetson-stats 4: ``jtop.power``.
JTOP_4_XAVIER = {
    "rail": {
        "GPU": {"volt": 5080, "curr": 61, "warn": 32760, "power": 9184, "online": True, "avg": 8021},
        "SYS5V": {"volt": 5080, "curr": 520, "warn": 32760, "power": 2640, "online": True, "avg": 2600},
    },
    "tot": {"power": 17178, "name": "ALL", "avg": 15861},
}
JTOP_4_ORIN_NANO = {
    "rail": {"VDD_CPU_GPU_CV": {"power": 1200, "avg": 1100}, "VDD_SOC": {"power": 1400, "avg": 1400}},
    "tot": {"power": 4567, "name": "VDD_IN", "avg": 4500},
}
#: jetson-stats 3: total and rails.
JTOP_3 = ({"ALL": {"cur": 9999, "avg": 9000}}, {"CPU": {"cur": 466, "avg": 470}, "GPU": {"cur": 310, "avg": 300}})

TRTEXEC = """&&&& RUNNING TensorRT.trtexec [TensorRT v8502] # trtexec --loadEngine=search.engine
[07/20/2023-10:02:11] [I] === Performance summary ===
[07/20/2023-10:02:11] [I] Throughput: 312.345 qps
[07/20/2023-10:02:11] [I] Latency: min = 3.11 ms, max = 3.95 ms, mean = 3.25 ms, median = 3.24 ms, percentile(90%) = 3.3 ms, percentile(95%) = 3.4 ms, percentile(99%) = 3.6 ms
[07/20/2023-10:02:11] [I] Enqueue Time: min = 1.1 ms, max = 1.9 ms, mean = 1.2 ms, median = 1.21 ms, percentile(90%) = 1.3 ms, percentile(95%) = 1.4 ms, percentile(99%) = 1.6 ms
[07/20/2023-10:02:11] [I] H2D Latency: min = 0.05 ms, max = 0.09 ms, mean = 0.06 ms, median = 0.055 ms, percentile(99%) = 0.08 ms
[07/20/2023-10:02:11] [I] GPU Compute Time: min = 3.0 ms, max = 3.8 ms, mean = 3.1 ms, median = 3.12 ms, percentile(90%) = 3.2 ms, percentile(95%) = 3.3 ms, percentile(99%) = 3.5 ms
[07/20/2023-10:02:11] [I] D2H Latency: min = 0.002 ms, max = 0.01 ms, mean = 0.004 ms, median = 0.0041 ms, percentile(99%) = 0.009 ms
[07/20/2023-10:02:11] [I] Total Host Walltime: 3.00452 s
"""  # noqa: E501
