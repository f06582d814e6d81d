"""Distillation on a small model: does it learn more from a teacher's working than from its answers (§5.4.1)?"""
