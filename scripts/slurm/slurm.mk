# A cluster of two "nodes" on this machine (apt-get install slurm-wlm munge), the tests on it, and its removal.
# Included by the Makefile, whose test-slurm runs the tests on the cluster of SLURM_CONF.

LOCAL_SLURM ?= /tmp/local_slurm_$(shell id -u)

.PHONY: test-slurm-local
test-slurm-local: $(READY)  ## test-slurm on a two-node cluster started on this machine
	trap 'scripts/local_slurm/down.sh $(LOCAL_SLURM)' EXIT; \
	settings=$$(scripts/local_slurm/up.sh $(LOCAL_SLURM)); eval "$$settings"; \
	$(MAKE) --no-print-directory test-slurm
