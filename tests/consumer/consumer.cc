// consumer.cc -- a C++ program that trains a DenseHead over its own memory: forward, backward, fused SGD, top-k
#include <widehead/widehead.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

namespace {

constexpr std::int64_t kBatch = 24, kFeatures = 17, kClasses = 301;

std::vector<float> uniform(std::int64_t rows, std::int64_t cols, std::uint64_t seed) {
  const widehead::RandomStream random{seed};
  std::vector<float> values(static_cast<std::size_t>(rows * cols));
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t c = 0; c < cols; ++c) {
      values[static_cast<std::size_t>(r * cols + c)] =
          2 * random.uniform(static_cast<std::uint64_t>(r), static_cast<std::uint32_t>(c)) - 1;
    }
  }
  return values;
}

int fail(const char* what) {
  std::printf("FAILED: %s\n", what);
  return 1;
}

}  // namespace

int main() {
  // Hidden features of the examples, a class for each, and the weights, which the optimiser's step changes.
  std::vector<float> hidden = uniform(kBatch, kFeatures, 1), weight = uniform(kClasses, kFeatures, 2);
  std::vector<float> bias(kClasses, 0.0f), losses(kBatch), lse(kBatch), grad_hidden(kBatch * kFeatures);
  const std::vector<float> grad_losses(kBatch, 1.0f / static_cast<float>(kBatch));
  std::vector<std::int64_t> target(kBatch);
  for (std::size_t i = 0; i < target.size(); ++i) target[i] = static_cast<std::int64_t>(i) * 12 % kClasses;

  const widehead::DenseLayer layer{
      .hidden = widehead::matrix(hidden.data(), kBatch, kFeatures),
      .weight = widehead::matrix(weight.data(), kClasses, kFeatures),
      .bias = {bias.data(), kClasses},
  };
  const widehead::Labels labels{.indices = target.data(), .rows = kBatch, .n_classes = kClasses};
  widehead::Update update{.optimizer = widehead::Optimizer::sgd, .lr = 2.0};

  double first = 0, before = 0, loss = 0;
  for (std::uint64_t step = 1; step <= 30; ++step) {
    widehead::dense_forward(
        {.layer = layer, .target = labels, .losses = {losses.data(), kBatch}, .lse = {lse.data(), kBatch}});
    update.step = step;
    widehead::dense_backward({.layer = layer,
                              .target = labels,
                              .lse = {lse.data(), kBatch},
                              .grad_losses = {grad_losses.data(), kBatch},
                              .grad_hidden = widehead::matrix(grad_hidden.data(), kBatch, kFeatures),
                              .update = &update});
    loss = 0;
    for (float l : losses) loss += static_cast<double>(l) / static_cast<double>(kBatch);
    std::printf("step %2d  loss %.4f\n", static_cast<int>(step), loss);
    if (!std::isfinite(loss)) return fail("the loss is not finite");
    if (step > 1 && loss >= before) return fail("the loss did not fall");
    if (step == 1) first = loss;
    before = loss;
  }
  if (loss > first / 4) return fail("the loss fell too little");

  // The best class of every example is its own by now.
  std::vector<float> scores(kBatch * 3);
  std::vector<std::int64_t> classes(kBatch * 3);
  widehead::dense_topk({.layer = layer,
                        .k = 3,
                        .scores = widehead::matrix(scores.data(), kBatch, 3),
                        .classes = widehead::matrix(classes.data(), kBatch, 3)});
  int right = 0;
  for (std::size_t i = 0; i < target.size(); ++i) right += classes[3 * i] == target[i];
  std::printf("%d of %d examples have their class on top; %d threads, %s\n", right, static_cast<int>(kBatch),
              widehead::get_num_threads(), widehead::name_of(widehead::current_isa()));
  if (right < kBatch * 9 / 10) return fail("too few");

  // Bad input is refused with the reason, and nothing has changed.
  const std::vector<float> weight_before = weight;
  target[5] = kClasses;
  try {
    widehead::dense_forward(
        {.layer = layer, .target = labels, .losses = {losses.data(), kBatch}, .lse = {lse.data(), kBatch}});
    return fail("a label out of range was taken");
  } catch (const widehead::LabelError& e) {
    std::printf("refused: %s\n", e.what());
  }
  return weight == weight_before ? 0 : fail("a refused call changed the weights");
}
