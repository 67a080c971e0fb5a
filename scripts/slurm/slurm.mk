# A cluster of two "nodes" on this machine (apt-get install slurm-wlm munge), the tests on it, and gone again.
# Included by the Makefile, whose test-slurm runs the tests on whatever cluster SLURM_CONF names.

LOCAL_SLURM ?= /tmp/local_slurm_$(shell id -u)

.PHONY: test-slurm-local
test-slurm-local: $(READY)  ## test-slurm on a two-node cluster started on this machine
	trap 'scripts/local_slurm/down.sh $(LOCAL_SLURM)' EXIT; \
	settings=$$(scripts/local_slurm/up.sh $(LOCAL_SLURM)); eval "$$settings"; \
	$(MAKE) --no-print-directory test-slurm
