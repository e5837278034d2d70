"""What a GPU must show: kernels that are right, and targets that are met. ``kvpolicy.lab.gpu_report`` runs it all."""
