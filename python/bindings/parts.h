// parts.h -- what the binding files share: one bind function a part, and the parsing of losses and updates
#pragma once
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <string>

#include "array.h"
#include "widehead/labels.h"
#include "widehead/loss.h"
#include "widehead/update.h"

namespace widehead::python {

void bind_bag(nb::module_& m);
void bind_dense(nb::module_& m);
void bind_exact(nb::module_& m);
void bind_exact_device(nb::module_& m);
void bind_hash_index(nb::module_& m);
void bind_hashed(nb::module_& m);
void bind_ngrams(nb::module_& m);
void bind_rows(nb::module_& m);
void bind_sparse(nb::module_& m);

// Targets of `rows` examples: one class each without indptr, CSR with it.
Labels labels_of(Arrays& arrays, nb::handle indptr, nb::handle indices, nb::handle values, std::int64_t rows,
                 std::int64_t n_classes);
// Targets of a layer of `held` classes: all there are, or with first_class a part of n_classes.
Labels labels_of(Arrays& arrays, nb::handle indptr, nb::handle indices, nb::handle values, std::int64_t rows,
                 std::int64_t held, std::optional<std::int64_t> n_classes, std::optional<std::int64_t> first_class);
LossOptions loss_of(Arrays& arrays, const std::string& loss, double label_smoothing, double lse_penalty, double softcap,
                    nb::handle class_weight, std::int64_t ignore_index, std::int64_t n_classes);

// "softmax" | "bce" | "squared_hinge"; throws ShapeError naming the ones there are.
Loss parse_loss(const std::string& name);

// A fused update as Python writes it: a dict with the fields of widehead::Update; state arrays may be absent or None.
// Throws ShapeError naming an unknown key or value.
Update parse_update(nb::handle dict, Arrays& arrays);

}  // namespace widehead::python
