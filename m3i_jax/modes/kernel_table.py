"""--mode=profile --kernels: the kernels that the train step of a configuration would run on this
device, each by itself: time, error and share of the peaks, as a table for a report. Reads no data
and trains nothing."""

import jax

from m3i_jax import schema
from m3i_jax.errors import UserError
from m3i_jax.modes import setup, show
from m3i_jax.parallel import kernel_calls
from m3i_jax.profiling import kernel_profile
from m3i_jax.training import trainer


def print_kernels(config: schema.Config) -> int:
    """Print the table; returns 0, or 1 if a kernel is wrong."""
    if (setting := kernel_calls.kernel_setting()) != "check":
        raise UserError(
            f"{kernel_calls.KERNELS}={setting}: --mode=profile --kernels checks all kernels; unset"
            " it"
        )
    config, mesh = setup.fit_to_devices(show.assume_data(config)[0])
    calls = traced_calls(trainer.Trainer(config, mesh, show.vocabulary_size(config)))
    first = not jax.process_index()
    if not calls:
        if first:
            kind = jax.local_devices()[0].device_kind
            print(f"the train step of this configuration has no kernel on {kind}")
        return 0
    profiles = [kernel_profile.profile_call(call) for call in calls]
    if first:
        print(kernel_profile.kernel_table(profiles))
    return int(any(each.result.reason for each in profiles))


def traced_calls(step_trainer: trainer.Trainer) -> list[kernel_calls.KernelCall]:
    """The calls of kernels in the train step."""
    batch = trainer.abstract_batch(step_trainer.config)
    kernel_calls.take_pending()  # of what this process traced before
    with jax.set_mesh(step_trainer.mesh), kernel_calls.noted_calls():
        jax.eval_shape(step_trainer.trace, step_trainer.template, batch)
    return kernel_calls.take_pending()
