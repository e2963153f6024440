"""The SQL judge's verdicts one at a time."""

from dpo_lightning.judging.sql.judge import validity_and_execution


def compiles(reply, context):
    return validity_and_execution(reply, "", context)[0]


def same_result(reply, wanted, context):
    return validity_and_execution(reply, wanted, context)[1]
