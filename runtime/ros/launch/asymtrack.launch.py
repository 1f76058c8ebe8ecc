"""Starts the node: ``ros2 launch asymtrack.launch.py image:=/camera/image_raw boxes:=10,20,30,40``."""

import sys

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, ExecuteProcess
from launch.substitutions import LaunchConfiguration

ARGUMENTS = {"image": "/camera/image_raw", "model": "T", "backend": "auto", "recover": "true", "boxes": ""}


def generate_launch_description():
    """What ``ros2 launch`` asks for."""
    declared = [DeclareLaunchArgument(name, default_value=value) for name, value in ARGUMENTS.items()]
    remap = ["image:=", LaunchConfiguration("image")]
    parameters = []
    for name in ("model", "backend", "recover"):
        parameters += ["-p", [f"{name}:=", LaunchConfiguration(name)]]
    parameters += ["-p", ["boxes:=['", LaunchConfiguration("boxes"), "']"]]
    # The package is an ordinary Python one, not of ament: it is run as a module of this Python.
    module = "asymtrack_edge.runtime.ros.node"
    command = [sys.executable, "-m", module, "--ros-args", "-r", remap, *parameters]
    return LaunchDescription([*declared, ExecuteProcess(cmd=command, output="screen")])
