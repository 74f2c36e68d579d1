"""Surgery on the user's model: conversion, calibration, restoration, checkpoints."""
