# A cluster of two "nodes" on this machine (apt-get install slurm-wlm munge), the tests on it, and its removal.
# Included by the Makefile, whose test-slurm runs the tests on the cluster of SLURM_CONF.

LOCAL_SLURM ?= /tmp/local_slurm_$(shell id -u)

LOCALLY = trap 'scripts/local_slurm/down.sh $(LOCAL_SLURM)' EXIT; \
	settings=$$(scripts/local_slurm/up.sh $(LOCAL_SLURM)); eval "$$settings"

.PHONY: test-slurm-local chaos-slurm
test-slurm-local: $(READY)  ## test-slurm on a two-node cluster started on this machine
	$(LOCALLY); $(MAKE) --no-print-directory test-slurm

chaos-slurm: $(READY)  ## preempt jobs of two ranks at random moments, on the same cluster (ARGS="--training 20 --seed 1")
	$(LOCALLY); OMP_NUM_THREADS=1 $(BIN)/python -m scripts.chaos_slurm $(ARGS)
