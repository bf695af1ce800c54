// widehead.h -- everything a C++ program includes
#pragma once
#include "widehead/bag.h"
#include "widehead/dense.h"
#include "widehead/error.h"
#include "widehead/isa.h"
#include "widehead/labels.h"
#include "widehead/loss.h"
#include "widehead/ngrams.h"
#include "widehead/parallel.h"
#include "widehead/random.h"
#include "widehead/topk.h"
#include "widehead/update.h"
#include "widehead/view.h"
