#include <widehead/widehead.h>

#include <cstdio>
#include <vector>

int main() {
  const std::int64_t batch = 32, features = 64, classes = 10000;
  std::vector<float> hidden(batch * features, 0.5f), weight(classes * features), grad_hidden(batch * features);
  std::vector<float> losses(batch), lse(batch), grad_losses(batch, 1.0f / batch);
  std::vector<std::int64_t> target(batch, 42);

  const widehead::DenseLayer layer{.hidden = widehead::matrix(hidden.data(), batch, features),
                                   .weight = widehead::matrix(weight.data(), classes, features)};
  const widehead::Labels labels{.indices = target.data(), .rows = batch, .n_classes = classes};
  widehead::Update update{.optimizer = widehead::Optimizer::sgd, .lr = 0.1};

  for (int step = 1; step <= 3; ++step, ++update.step) {
    widehead::dense_forward(
        {.layer = layer, .target = labels, .losses = {losses.data(), batch}, .lse = {lse.data(), batch}});
    widehead::dense_backward({.layer = layer,
                              .target = labels,
                              .lse = {lse.data(), batch},
                              .grad_losses = {grad_losses.data(), batch},
                              .grad_hidden = widehead::matrix(grad_hidden.data(), batch, features),
                              .update = &update});
    std::printf("step %d: loss %.3f\n", step, static_cast<double>(losses[0]));
  }
}
