# Keyhold: `make help` lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# A workspace could raise a module's version inside the enclave, and with it change PCR0.
export GOWORK := off

DEMO_DIR ?= .keyhold/demo
RECORDS  ?= 100000
KEYS     ?= 100
BATCH    ?= 500
FUZZTIME ?= 10s

# Where goroutines meet. The rest is single-threaded or plain data, and the race detector costs 5 to 10 times.
RACE_PKGS ?= $(addprefix ./,$(patsubst %/,%,$(sort $(dir $(wildcard $(addsuffix /*.go,\
	enclave/internal/serve enclave/internal/sign enclave/internal/keyring enclave/internal/logring \
	parent parent/watch parent/lease parent/pipeline parent/signclient parent/egress parent/store/memory \
	internal/awshttp internal/awslocal/dynoxide internal/awslocal/fault \
	internal/vmtest/hostvsock internal/vmtest/nsmdev internal/vmtest/qemu internal/vmtest/vhostuser))))))

GOLANGCI_VERSION := v2.15.0
GOLANGCI := .tools/golangci-lint-$(GOLANGCI_VERSION)/golangci-lint

# The enclave is one static file, and the same bytes from any folder: PCR0 depends on it.
# internal/archtest lists its modules under the same tags.
ENCLAVE_TAGS    := netgo,osusergo
ENCLAVE_LDFLAGS := -s -w -buildid= -extldflags=-static
ENCLAVE_ENV     := env -u CGO_CFLAGS -u CGO_CPPFLAGS -u CGO_LDFLAGS GOFLAGS= CGO_ENABLED=1

.PHONY: help
help: ## explain the targets
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "  %-13s %s\n", $$1, $$2 }' Makefile

.PHONY: demo
demo: tools build ## sign RECORDS (100000) random records with KEYS (100) keys in DEMO_DIR, then verify every signature and receipt
	bin/keyhold-local run --dir $(DEMO_DIR) --records $(RECORDS) --keys $(KEYS) --batch-size $(BATCH)
	@echo "The same command continues in $(DEMO_DIR) and signs nothing twice; make clean, or another DEMO_DIR, starts afresh."

.PHONY: test
test: tools ## vet, run the whole test suite, the concurrent packages under the race detector, and the tests of infra/
	go vet ./...
	KEYHOLD_REQUIRE_SERVICES=1 go test -timeout 20m ./...
	KEYHOLD_REQUIRE_SERVICES=1 go test -race -short -timeout 10m $(RACE_PKGS)
	$(MAKE) --no-print-directory infra-test

.PHONY: bench
bench: tools build ## measure the ratios of docs/performance.md
	go run ./internal/bench

.PHONY: lint
lint: $(GOLANGCI) ## check the code, its format and its import directions
	$(GOLANGCI) run ./...
	cd infra && ../$(GOLANGCI) run ./...

.PHONY: fmt
fmt: $(GOLANGCI) ## format the code as lint wants it
	$(GOLANGCI) fmt ./...
	cd infra && ../$(GOLANGCI) fmt ./...

.PHONY: fuzz
fuzz: ## run every native fuzz target for FUZZTIME (10s)
	scripts/fuzz $(FUZZTIME)

.PHONY: tools
tools: tools/node_modules/.package-lock.json ## install the local DynamoDB and the checking libraries that npm delivers

# npm writes this file last, so it is there only when the installation is whole.
tools/node_modules/.package-lock.json: tools/package.json tools/package-lock.json tools/.npmrc
	scripts/check-tools
	cd tools && npm ci
	touch $@

# The version is in the path, so another version is another file.
$(GOLANGCI):
	GOFLAGS= GOBIN=$(CURDIR)/$(@D) go install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(GOLANGCI_VERSION)

.PHONY: build
build: ## build bin/keyhold-enclave, bin/keyhold-parent, bin/keyhold and bin/keyhold-local
	$(ENCLAVE_ENV) go build -trimpath -buildvcs=false -tags $(ENCLAVE_TAGS) -ldflags '$(ENCLAVE_LDFLAGS)' -o bin/keyhold-enclave ./cmd/enclave
	go build -trimpath -o bin/keyhold-parent ./cmd/parent
	go build -trimpath -o bin/keyhold ./cmd/keyhold
	go build -trimpath -o bin/keyhold-local ./cmd/keyhold-local

.PHONY: clean
clean: ## remove bin/ and the demo's folder (installed tools stay)
	rm -rf bin .keyhold/demo

# Built in a module of their own, whose go.sum pins all they consist of: what they need is not Keyhold's.
.tools/go/capslock: TOOL := github.com/google/capslock/cmd/capslock
.tools/go/cyclonedx-gomod: TOOL := github.com/CycloneDX/cyclonedx-gomod/cmd/cyclonedx-gomod
.tools/go/%: tools/go/go.mod tools/go/go.sum
	cd tools/go && GOFLAGS= go build -trimpath -buildvcs=false -o $(CURDIR)/$@ $(TOOL)

.PHONY: capabilities
capabilities: .tools/go/capslock ## compare what enclave and parent can do with the baseline (UPDATE=1 writes it anew)
	KEYHOLD_CAPSLOCK=$(CURDIR)/$< go test -count=1 -v -run 'Capabilit' ./internal/archtest $(if $(UPDATE),-update)

# The tool cannot leave the time out, and the same commit shall give the same file.
define sbom
env -u CGO_CFLAGS -u CGO_CPPFLAGS -u CGO_LDFLAGS GOFLAGS=$(2) CGO_ENABLED=1 \
	.tools/go/cyclonedx-gomod app -json -noserial -main cmd/$(1) . | sed '/^    "timestamp": /d' >dist/keyhold-$(1).cdx.json
endef

.PHONY: sbom
sbom: .tools/go/cyclonedx-gomod ## write dist/keyhold-enclave.cdx.json and dist/keyhold-parent.cdx.json
	mkdir -p dist
	$(call sbom,enclave,-tags=$(ENCLAVE_TAGS))
	$(call sbom,parent,)
	KEYHOLD_SBOM=$(CURDIR)/dist go test -count=1 -v -run 'SBOM' ./internal/archtest

.PHONY: sweep
sweep: ## make every two remote calls of a small run go wrong, in every way (minutes)
	KEYHOLD_SWEEP=full go test -count=1 -timeout 60m -v -run 'TestEveryRemoteCall|TestEveryTwo' ./parent/pipeline

.PHONY: soak
soak: tools ## sign KEYHOLD_SOAK_RECORDS (1000000) records, or for SOAK=2m, while processes are killed; then judge tables and growth
	go run ./internal/soak $(if $(SOAK),-time $(SOAK)) $(if $(SEED),-seed $(SEED))

# Plain go test runs some hundred schedules and no mutant, make test this many and all. make sim runs any number.
test: export KEYHOLD_SIM_SCHEDULES ?= 10000
test: export KEYHOLD_SIM_MUTANTS ?= 1

.PHONY: sim
sim: ## run SCHEDULES (100000) simulated schedules of parents and enclaves under faults
	KEYHOLD_SIM_SCHEDULES=$(or $(SCHEDULES),100000) go test -count=1 -timeout 24h -v -run TestEverySeeded ./internal/sim

.PHONY: mutants
mutants: ## show that the simulator finds every mutant of its testdata/mutants within 500 schedules, and the call sweep those of its own (minutes)
	KEYHOLD_SIM_MUTANTS=1 go test -count=1 -timeout 60m -v -run 'TestEveryMutantIsKilled|TestTheSweepFindsEveryMutant' ./internal/sim ./parent/pipeline

.PHONY: model
model: ## check the promises G1 to G5 on models of the protocol, and that each mutant of them is caught
	model/run

# The kernel of the last make eif is kept, so that building again gives the same PCR0; rm -r dist/kernel takes
# the newest one instead.
dist/kernel/amd64/version:
	scripts/kernel

.PHONY: eif
eif: dist/kernel/amd64/version ## build dist/amd64/keyhold.eif and measurements.json, the enclave image, without Docker
	scripts/check-tools build
	$(MAKE) --no-print-directory build
	bin/keyhold image build

# The images are booted for real, on an emulated machine; docs/vm-test.md says what is not real about it.
.PHONY: vm-test
vm-test: eif ## boot the enclave images in a virtual machine and sign 10,000 records in there (2 minutes)
	scripts/vm-tools
	$(ENCLAVE_ENV) go build -trimpath -buildvcs=false -tags $(ENCLAVE_TAGS) -ldflags '$(ENCLAVE_LDFLAGS)' -o bin/vm/testimage ./cmd/internal/guest/testimage
	CGO_ENABLED=0 go build -trimpath -o bin/vm/bootstrap ./internal/vmtest/bootstrap
	KEYHOLD_VM=1 go test -count=1 -timeout 15m -parallel 2 -v ./internal/vmtest

# QEMU's own reader of images, as a second judge of checksum and registers. Built once, in some ten minutes.
.tools/nitro/kernel/version: scripts/nitro-machine scripts/nitro-machine.config
	nice scripts/nitro-machine .tools/nitro

.PHONY: vm-test-nitro
vm-test-nitro: .tools/nitro/kernel/version ## boot the enclave image on QEMU's nitro-enclave machine and compare the PCRs (builds QEMU and a kernel first)
	$(MAKE) --no-print-directory build
	KEYHOLD_NITRO=$(CURDIR)/.tools/nitro go test -count=1 -timeout 15m -v ./internal/vmtest/nitro

# Deployment (docs/deploy.md). A release is a folder that holds all that is deployed, and one pair of image and
# config; PROFILE, ACCOUNT, REGION, AMI and so on are what cdk gets with -c.
ARCH     ?= amd64
VERSION  ?= $(shell git rev-parse --short=12 HEAD)
RELEASE  ?= ../dist/release/$(VERSION)-$(ARCH)
PROFILE  ?= prod
INFRA_GO := env GOFLAGS=-buildvcs=false JSII_SILENCE_WARNING_END_OF_LIFE_NODE_VERSION=1

.PHONY: dist
dist: ## build dist/release/VERSION-ARCH, all that a deployment needs (EIF=FOLDER names the image of ARCH=arm64)
	$(if $(EIF)$(filter arm64,$(ARCH)),,$(MAKE) --no-print-directory eif)
	EIF=$(EIF) infra/scripts/dist $(ARCH) $(patsubst ../%,%,$(RELEASE))

infra/node_modules/.package-lock.json: infra/package.json infra/package-lock.json infra/.npmrc
	scripts/check-tools infra
	cd infra && npm ci
	touch $@

.PHONY: infra-test
infra-test: ## test infra/, its own module: templates, policies, functions (no validation, no account)
	cd infra && $(INFRA_GO) go vet ./... && $(INFRA_GO) go test -timeout 10m ./...

.PHONY: infra-check
infra-check: infra/node_modules/.package-lock.json ## all of infra-test, with CloudFormation's rules, cdk-nag, and the rights of roles against the code
	scripts/check-tools infra
	cd infra && $(INFRA_GO) go vet ./... && KEYHOLD_INFRA_CHECK=1 $(INFRA_GO) go test -count=1 -timeout 15m ./...

infra_values = profile=$(PROFILE) arch=$(ARCH) account=$(ACCOUNT) region=$(REGION) zones=$(ZONES) ami=$(AMI) \
	instance=$(INSTANCE) admins=$(ADMINS) email=$(EMAIL) release=$(RELEASE)

.PHONY: deploy-plan
deploy-plan: infra/node_modules/.package-lock.json ## print the deployments of a first installation, with commands and differences
	@cd infra && $(INFRA_GO) go run ./cmd/plan first $(infra_values)

.PHONY: infra-diff
infra-diff: infra/node_modules/.package-lock.json ## print the three deployments from RELEASE to NEXT, with commands and differences; needs no account
	@cd infra && $(INFRA_GO) go run ./cmd/plan roll $(infra_values) next=$(NEXT)
